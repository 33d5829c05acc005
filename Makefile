.PHONY: test demo-cluster

test: # linters and the whole suite
	scripts/test

demo-cluster: # a shell on the login node of a Slurm cluster in namespaces
	scripts/demo-cluster
