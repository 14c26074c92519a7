# fleet-kms: `make help` lists the targets.
.PHONY: help proto proto-check
help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

proto: ## generate crates/proto/src/generated from proto/
	cargo run -q -p fleet-kms-proto --example generate

proto-check: proto ## fail when the generated code differs from proto/
	git diff --exit-code -- crates/proto/src/generated
