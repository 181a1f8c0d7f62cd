# Thin on purpose: every target is one script under hack/, which installs what it needs.
.DEFAULT_GOAL := help
.PHONY: help demo test alerts audit bench fleet kernels setup cache-key clean-lab cluster cluster-install cluster-demo cluster-down conformance

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 24

demo: ## the main job on a real control plane: three nodes, real packets (KEEP=1 leaves it running, SVG=FILE draws it)
	@KEEP="$(KEEP)" SVG="$(SVG)" hack/demo.sh

test: ## format, lints and all tests; the last line is the total
	@hack/test.sh

alerts: ## tests the alert rules with promtool, as a part of test does
	@hack/alerts.sh

audit: ## licences, bans and sources of all dependencies
	@hack/audit.sh

bench: ## first figures beside the real kube-proxy (minutes)
	@hack/bench.sh

fleet: ## the controller's cost with thousands of hollow agents (NODES=100,500,1000)
	@hack/fleet.sh $(if $(NODES),--nodes $(NODES))

kernels: ## the agent's rules and packets on Debian's kernels 6.1 and 6.12, emulated (half an hour)
	@hack/kernels.sh

setup: ## what the targets above do first: Debian packages and the control plane
	@hack/setup.sh

cache-key: ## name and folder of the prebuilt control plane, for a CI cache that keeps it between machines
	@hack/setup.sh cache-key

clean-lab: ## removes the namespaces and files that a killed run left behind
	@hack/clean-lab.sh

cluster: ## a real cluster on this machine: kubelets, containers, no service proxy yet (PROXY=kube-proxy starts with one)
	@exec hack/cluster.sh up --proxy "$(or $(PROXY),none)"

cluster-install: ## installs this build of Switchtower on the cluster, with kubectl apply -k manifests
	@hack/cluster.sh install

cluster-demo: ## a cluster, Switchtower on it, Deployments scaled and an agent killed, with plain kubectl
	@hack/cluster.sh up
	@hack/cluster.sh install
	@hack/cluster.sh demo

conformance: ## upstream's e2e tests of Services on a fresh cluster (PROXY=kube-proxy for the baseline; PART=quick, load-balancers or serial)
	@hack/cluster.sh down
	@hack/cluster.sh up --proxy "$(if $(filter kube-proxy,$(PROXY)),kube-proxy,none)"
	@$(if $(filter kube-proxy,$(PROXY)),true,hack/cluster.sh install)
	@hack/cluster.sh conformance --label "$(or $(PROXY),switchtower)" --part "$(or $(PART),all)"

cluster-down: ## removes it, wherever it was interrupted
	@hack/cluster.sh down
