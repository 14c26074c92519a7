# fleet-kms: `make help` lists the targets.
.PHONY: schemathesis admin-load attacks audit-bench audit-crash simulate help demo demo-stop bench fuzz test test-matrix check fmt-check lint doc deny proto proto-check openapi roles crash

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

demo: ## a real API server with its Secrets encrypted by both programs; KEEP=1 leaves it running
	@tests/demo.sh $(if $(KEEP),--keep)

demo-stop: ## stop what `make demo KEEP=1` left running
	@tests/demo.sh --stop

test: ## everything that CI runs: format, lint, documentation, licences, unit, system and real-peer tests
	@tests/ci/run.sh

bench: ## a Decrypt through both hops against a bare two-hop echo on the same transport, release builds
	cargo build --release --workspace --bins
	cargo run --release -p fleet-kms-tests --bin kms-bench

FUZZ_SECONDS ?= 60
fuzz: ## fuzz the parsers of outside bytes, FUZZ_SECONDS each
	@tests/ci/fuzz.sh $(FUZZ_SECONDS)

simulate: ## 40 years of 10,000 clusters, and all of them due at once: figures, about 20 minutes and 4 GiB
	CARGO_PROFILE_DEV_OPT_LEVEL=2 cargo test -p fleet-kms-agent --lib -- --ignored --nocapture ten_thousand
	CARGO_PROFILE_DEV_OPT_LEVEL=2 cargo build --workspace
	CARGO_PROFILE_DEV_OPT_LEVEL=2 CLUSTERS=10000 DUE=10000 PER_SECOND=50 \
		cargo test -p fleet-kms-tests --test many_clusters -- --nocapture --test-threads=1

MATRIX ?= 1.30.14 1.34.4 1.36.3

test-matrix: ## the control-plane tests on older kube-apiservers; builds each one first, which takes minutes
	cargo build --locked --workspace --bins
	@set -e; for version in $(MATRIX); do \
		echo "=== kube-apiserver $$version"; \
		FLEET_KMS_KUBE_VERSION=$$version cargo test --locked -p fleet-kms-tests --no-fail-fast \
			--test control_plane --test kube_apiserver --test outages; \
	done

check: fmt-check lint ## the inner loop, under 3 minutes warm: format, lint, unit tests
	cargo test --workspace --lib --bins

fmt-check: ## fail on unformatted code
	cargo fmt --all -- --check

lint: ## clippy; warnings are errors
	cargo clippy --workspace --all-targets -- -D warnings

doc: ## build the documentation; broken links are errors
	RUSTDOCFLAGS="-D warnings" cargo doc --no-deps --workspace

deny: ## check licences, bans, sources and advisories of all dependencies
	@tests/ci/deny.sh

proto: ## generate crates/proto/src/generated from proto/
	cargo run -q -p fleet-kms-proto --example generate

proto-check: proto ## fail when the generated code differs from proto/
	git diff --exit-code -- crates/proto/src/generated

openapi: ## write docs/openapi.json and docs/admin-api.md from the admin API's types
	UPDATE_OPENAPI=1 cargo test -q -p fleet-kms-admin-api in_the_tree

schemathesis: ## try every operation of the admin API by its own document, EXAMPLES=200 each (make test: 8)
	cargo build --bins
	FLEET_KMS_SCHEMATHESIS_EXAMPLES=$(or $(EXAMPLES),200) \
		cargo test -p fleet-kms-tests --test schemathesis -- --nocapture

admin-load: ## data calls while 200 admins list 10,000 clusters, in one run: figures, about 3 minutes
	CARGO_PROFILE_DEV_OPT_LEVEL=2 cargo build --bins
	CARGO_PROFILE_DEV_OPT_LEVEL=2 CLUSTERS=10000 ADMINS=200 SECONDS_EACH=10 \
		cargo test -p fleet-kms-tests --test admin_load -- --nocapture

roles: ## write docs/admin-roles.md from the authorization table
	UPDATE_ROLES=1 cargo test -q -p fleet-kms-agent --lib the_documented_roles

crash: ## crash trials on the built agent: every disk operation of every change in order, then N=1000 random ones (SEED=1)
	cargo build -p fleet-kms-agent
	FLEET_KMS_CRASH_TRIALS=$(or $(N),1000) FLEET_KMS_CRASH_SEED=$(or $(SEED),1) \
		cargo test -p fleet-kms-tests --test crash -- --nocapture --test-threads=1

attacks: ## the attacks and storms in full: 100,000 guesses, 1,000 enrolments, 200 bans, 3,000 renewals; 20 minutes
	cargo build --workspace --bins
	GUESSES=100000 cargo test -p fleet-kms-tests --test attacks -- --nocapture guessed
	BANS=200 cargo test -p fleet-kms-tests --test bans -- --nocapture
	ENROLMENTS=1000 cargo test -p fleet-kms-tests --test enrolments -- --nocapture
	IDENTITIES=3000 cargo test -p fleet-kms-tests --test renewals -- --nocapture
	NOISY_CONNECTIONS=8 QUIET_CALLS=1000 cargo test -p fleet-kms-tests --test limits -- --nocapture quiet

audit-bench: ## what recording each data call costs, against sums, release builds
	cargo build --release --workspace --bins
	FLEET_KMS_BIN=$${CARGO_TARGET_DIR:-target}/release \
		cargo run --release -p fleet-kms-tests --bin kms-audit-bench

audit-crash: ## crash trials of the audit on the built agent, N=2000
	cargo build -p fleet-kms-agent
	FLEET_KMS_AUDIT_CRASH_TRIALS=$(or $(N),2000) \
		cargo test -p fleet-kms-tests --test audit_crash -- --nocapture --test-threads=1
