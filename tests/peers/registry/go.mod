module sandpod/peers/registry
// usually 10 seconds on two cores

go 1.26.2

tool github.com/google/go-containerregistry/cmd/registry

require github.com/google/go-containerregistry v0.22.1 // indirect
