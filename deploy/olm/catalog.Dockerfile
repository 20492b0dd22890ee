# The catalog's image, whose server is the Operator Framework's: buildah build --file deploy/olm/catalog.Dockerfile --tag sandpod.io/operator-catalog:0.1.0 deploy/olm/catalog
FROM quay.io/operator-framework/opm:latest
ENTRYPOINT ["/bin/opm"]
CMD ["serve", "/configs", "--cache-dir=/tmp/cache"]
COPY . /configs/sandboxed-containers-operator/
LABEL operators.operatorframework.io.index.configs.v1=/configs
