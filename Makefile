# Each target is a script in hack/, which installs its requirements.
.DEFAULT_GOAL := help
.PHONY: help demo test alerts audit bench fleet chaos kernels setup cache-key clean-lab cluster cluster-install cluster-demo cluster-down conformance

help: ## List the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 24

demo: ## Run the demo: real control plane, three nodes, real packets (KEEP=1 keeps it running, SVG=FILE records it)
	@KEEP="$(KEEP)" SVG="$(SVG)" hack/demo.sh

test: ## Check format and lints and run all tests; the last line is the total
	@hack/test.sh

alerts: ## Test the alert rules with promtool (part of test)
	@hack/alerts.sh

audit: ## Check licences, bans and sources of all dependencies (part of test)
	@hack/audit.sh

bench: ## Measure, with the real kube-proxy (PART=node, packets, growth, fleet, micro, all; minutes)
	@hack/bench.sh "$(or $(PART),node)"

fleet: ## Measure the controller with thousands of hollow agents (NODES=100,500,1000; docs/scale.md)
	@hack/fleet.sh $(if $(NODES),--nodes $(NODES))

chaos: ## Inject every fault under continuous traffic (ROUNDS=3, SEED=7; docs/reliability.md)
	@hack/chaos.sh "$(or $(ROUNDS),1)" "$(or $(SEED),1)"

kernels: ## Test the agent on Debian kernels 6.1 and 6.12, emulated (half an hour)
	@hack/kernels.sh

setup: ## Install Debian packages and build the control plane
	@hack/setup.sh

cache-key: ## Print name and folder of the prebuilt control plane, for a CI cache
	@hack/setup.sh cache-key

clean-lab: ## Remove namespaces and files left by a killed run
	@hack/clean-lab.sh

cluster: ## Start a real cluster on this machine, without service proxy (PROXY=kube-proxy: with kube-proxy)
	@exec hack/cluster.sh up --proxy "$(or $(PROXY),none)"

cluster-install: ## Install this build of Switchtower on the cluster
	@hack/cluster.sh install

cluster-demo: ## Start a cluster with Switchtower, scale Deployments and kill an agent
	@hack/cluster.sh up
	@hack/cluster.sh install
	@hack/cluster.sh demo

conformance: ## Run upstream's e2e tests of Services on a new cluster (PROXY=kube-proxy: baseline; PART=quick, load-balancers or serial)
	@hack/cluster.sh down
	@hack/cluster.sh up --proxy "$(if $(filter kube-proxy,$(PROXY)),kube-proxy,none)"
	@$(if $(filter kube-proxy,$(PROXY)),true,hack/cluster.sh install)
	@hack/cluster.sh conformance --label "$(or $(PROXY),switchtower)" --part "$(or $(PART),all)"

cluster-down: ## Remove the cluster, also after an interruption
	@hack/cluster.sh down
