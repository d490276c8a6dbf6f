pub mod fakefs;
