# Thin on purpose: every target is one script under hack/, which installs what it needs.
.DEFAULT_GOAL := help
.PHONY: help demo test audit bench setup clean-lab cluster cluster-down

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

demo: ## the main job on a real control plane: three nodes, real packets (KEEP=1 leaves it running)
	@KEEP="$(KEEP)" hack/demo.sh

test: ## format, lints and all tests; the last line is the total
	@hack/test.sh

audit: ## licences, bans and sources of all dependencies
	@hack/audit.sh

bench: ## first figures beside the real kube-proxy (minutes)
	@hack/bench.sh

setup: ## what the targets above do first: Debian packages and the control plane
	@hack/setup.sh

clean-lab: ## removes the namespaces and files that a killed run left behind
	@hack/clean-lab.sh

cluster: ## a real cluster on this machine: kubelets, containers, no service proxy yet (PROXY=kube-proxy starts with one)
	@hack/cluster.sh up --proxy "$(or $(PROXY),none)"

cluster-down: ## removes it, wherever it was interrupted
	@hack/cluster.sh down
