#!/bin/sh
# Collects what a report of something wrong with kata on a cluster needs, into a folder and a gzipped tar of it:
# KataConfigs, nodes, RuntimeClasses, the operator's objects, logs, events and metrics, and `kata-ctl gather` of each
# node where the pods of deploy/monitoring/daemonset.yaml are. It only reads. It takes no Secret and no ConfigMap, and of
# users' pods no specification, environment or log.
#   must-gather.sh [<folder>]          makes a new one by default; with KUBECTL=oc it uses that
set -eu
[ $# -le 1 ] || { sed -n '6s/^# *//p' "$0" >&2; exit 2; }
kubectl=${KUBECTL:-kubectl}
namespace=${NAMESPACE:-openshift-sandboxed-containers-operator}
out=${1:-must-gather-$(date -u +%Y%m%dT%H%M%SZ)}
[ ! -e "$out" ] || { echo "must-gather: $out exists; name a folder that does not" >&2; exit 1; }
# The variable may hold options too.
k() { $kubectl --request-timeout=60s "$@"; }
k version >/dev/null 2>&1 || { echo "must-gather: \`$kubectl version\` does not reach the cluster" >&2; exit 1; }
umask 077
mkdir -p "$out/operator" "$out/nodes"

# Puts what a command prints into a file; what it complains of into another, for that may be the finding.
put() {
  file=$out/$1
  shift
  if ! "$@" >"$file" 2>"$file.errors"; then
    echo "must-gather: \`$*\` failed; ${file#"$out"/}.errors says why" >&2
  elif [ ! -s "$file" ]; then
    # That nothing was found is no complaint.
    mv "$file.errors" "$file"
  fi
  [ -s "$file.errors" ] || rm -f "$file.errors"
}
own() { k --namespace "$namespace" "$@"; }
ours=app.kubernetes.io/name=sandpod component=app.kubernetes.io/component

put versions.yaml k version --output yaml
put kataconfigs.yaml k get kataconfigs --output yaml
put runtimeclasses.yaml k get runtimeclasses --output yaml

put nodes.all k get nodes --output go-template='{{range .items}}{{$node := .metadata.name}}{{with .status.nodeInfo}}{{
  $node}} runs {{.kubeletVersion}}, {{.containerRuntimeVersion}}, {{.osImage}}, {{.kernelVersion}}, {{.architecture}}
{{end}}{{if .spec.unschedulable}}{{$node}} is unschedulable
{{end}}{{range .spec.taints}}{{$node}} taint {{.key}}={{if .value}}{{.value}}{{end}}:{{.effect}}
{{end}}{{range .status.conditions}}{{$node}} condition {{.type}}={{.status}} {{.reason}}
{{end}}{{range $key, $value := .metadata.labels}}{{$node}} label {{$key}}={{$value}}
{{end}}{{range $key, $value := .metadata.annotations}}{{$node}} annotation {{$key}}={{printf "%q" $value}}
{{end}}{{end}}'
# Of the annotations only ours: others may hold anything.
awk '$2 != "annotation" || $3 ~ /^([^=]*\.)?(sandpod|katacontainers)\.io\//' "$out/nodes.all" >"$out/nodes.txt"
rm "$out/nodes.all"

# Users' pods: who they are and how they are.
put pods.txt k get pods --all-namespaces --output go-template='{{range .items}}{{if .spec.runtimeClassName}}{{
  .metadata.namespace}}/{{.metadata.name}} class {{.spec.runtimeClassName}} on {{
  if .spec.nodeName}}{{.spec.nodeName}}{{else}}no node{{end}}: {{.status.phase}}{{
  range .status.conditions}} {{.type}}={{.status}}{{if .reason}}({{.reason}}){{end}}{{end}}
{{end}}{{end}}'
put events-of-pods.txt k get events --all-namespaces --field-selector reason=FailedCreatePodSandBox
put events-of-nodes.txt k get events --namespace default \
  --field-selector reportingComponent=sandpod.io/sandpod-operator

put operator/objects.yaml own get deployments,daemonsets,pods --selector $ours --output yaml
# The address of a proxy may have a password.
sed -E 's,(://)[^/@ ]*@,\1***@,' "$out/operator/objects.yaml" >"$out/operator/objects" &&
  mv "$out/operator/objects" "$out/operator/objects.yaml"
put operator/lease.yaml own get lease sandpod-operator --output yaml
put operator/events.txt own get events
for pod in $(own get pods --selector $ours --output name); do
  name=${pod#pod/}
  put "operator/$name.log" own logs "$pod" --timestamps
  # Most pods have had no container before the one that runs.
  before=$out/operator/$name.before.log
  own logs "$pod" --previous --timestamps >"$before" 2>/dev/null || rm "$before"
done
for pod in $(own get pods --selector $ours,$component=controller --output name); do
  name=${pod#pod/}
  put "operator/$name.metrics" k get --raw "/api/v1/namespaces/$namespace/pods/$name:8080/proxy/metrics"
done

# What a node itself can say, by the monitor's pod on it.
program=/opt/sandpod/current/bin/kata-ctl
monitors=$(own get pods --selector $ours,$component=monitor --output \
  'jsonpath={range .items[*]}{.spec.nodeName} {.metadata.name}{"\n"}{end}')
nodes=$(k get nodes --selector katacontainers.io/kata-runtime=true --output 'jsonpath={.items[*].metadata.name}')
for node in $nodes; do
  monitor=$(echo "$monitors" | awk -v node="$node" '$1 == node { print $2; exit }')
  archive=$out/nodes/$node.tar.gz errors=$out/nodes/$node.errors
  if [ -n "$monitor" ] &&
    $kubectl --namespace "$namespace" exec "$monitor" -- $program gather --output - >"$archive" 2>"$errors"; then
    rm "$errors"
    echo "This was asked for in the monitor's pod: journal.txt and kernel.txt would need programs of the node's, and" \
      "check.txt is of the pod's devices. \`$program gather\` on the node has these." >"$out/nodes/$node.txt"
  else
    rm -f "$archive"
    echo "There is nothing from the node itself. Run \`$program gather\` there as root, or apply" \
      "deploy/monitoring/daemonset.yaml and gather once more." >"$out/nodes/$node.txt"
    echo "must-gather: nothing from the node $node itself; nodes/$node.txt says how to get it" >&2
  fi
done

tar -czf "$out.tar.gz" -C "$(dirname "$out")" "$(basename "$out")"
echo "$out.tar.gz"
