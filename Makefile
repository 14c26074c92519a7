# fleet-kms: `make help` lists the targets.
.PHONY: help proto proto-check demo demo-stop
help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

proto: ## generate crates/proto/src/generated from proto/
	cargo run -q -p fleet-kms-proto --example generate

proto-check: proto ## fail when the generated code differs from proto/
	git diff --exit-code -- crates/proto/src/generated

demo: ## the main job on real peers; KEEP=1 leaves it running
	@tests/demo.sh $(if $(KEEP),--keep)

demo-stop: ## stop a demo that was left running
	@tests/demo.sh --stop
