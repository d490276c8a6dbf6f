//! The `vmailfs` command.

fn main() -> std::process::ExitCode {
    vmailfs::cli::main()
}
