#!/usr/bin/env bash
# Prints the bill of materials of a release, CycloneDX 1.5 in JSON: both images, our programs in them, and what those
# are made of: crates, Debian packages, the guest's kernel. What a component holds is in its dependencies. The same
# inputs give the same bytes.
#   sbom.sh <version> <payload> <virtiofsd> <digests>
# <digests> is a file with a line for each image: its archive, its name with tag, its digest.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
top=$here/../..
[ $# = 4 ] || { sed -n '5s/^# *//p' "$0" >&2; exit 2; }
version=$1 payload=$2 virtiofsd=$3 digests=$4
programs=(agent/kata-agent shim/{containerd-shim-kata-v2,kata-ctl} operator/sandpod-operator
  operator/installer/sandpod-installer)
tool=$("$here/build-cyclonedx.sh")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# cargo-cyclonedx writes beside the manifests, so it gets copies.
mkdir "$work"/{sandpod,crates.io}
cp -r "$top"/{Cargo.toml,Cargo.lock,agent,operator,shim,tests,vmm} "$work/sandpod"
cp -r "$(dirname "$(dirname "$(realpath "$virtiofsd")")")/source" "$work/crates.io/virtiofsd"
for workspace in sandpod crates.io/virtiofsd; do
  (
    cd "$work/$workspace"
    SOURCE_DATE_EPOCH=0 "$tool" cyclonedx --quiet --format json --spec-version 1.5 --describe binaries \
      --target x86_64-unknown-linux-gnu --no-build-deps
  ) >&2
done
# Where they were is nobody's business.
for program in "${programs[@]/#/sandpod/}" crates.io/virtiofsd/virtiofsd; do
  sed "s|path+file://$work/|workspace:|g" "$work/${program}_bin.cdx.json"
done >"$work/programs"
"$here/shipped.sh" debian "$payload" >"$work/debian"
"$here/shipped.sh" kernel "$payload" >"$work/kernel"

jq -n --slurpfile programs "$work/programs" --rawfile debian "$work/debian" --rawfile kernel "$work/kernel" \
  --rawfile images "$digests" --arg version "$version" --arg rust "$(rustc --version | cut -d' ' -f2)" \
  --arg license Apache-2.0 '
  def lines: split("\n") | map(select(. != ""));
  # As purls are written: only these characters stand for themselves.
  def purl: @uri | gsub("%3A"; ":");
  def deb($name; $version; $arch): "pkg:deb/debian/\($name | @uri)@\($version | purl)?arch=\($arch)&distro=debian-12";
  # Each program has a name of its own, for two may be of one package. Crates of our own are not in a registry.
  def mine: if ."bom-ref" | startswith("workspace:sandpod/") then
      .purl = "pkg:github/sandpod/sandpod@\($version)#\(."bom-ref" | capture("sandpod/(?<path>[^#]*)#").path)"
      else . end;
  [ $programs[] | .metadata.component as $program | ($program.name + "@" + $program.version) as $name
    | (if $program.name == "virtiofsd" then "pkg:cargo/virtiofsd@\($program.version)"
       else "pkg:github/sandpod/sandpod@\($version)#\($program.name)" end) as $purl
    | ([.components[] | ."bom-ref"]) as $known
    | { program: ($program + { "bom-ref": $name, purl: $purl, type: "application" } | del(.externalReferences)),
        crates: (.components | map(mine)),
        dependencies: [.dependencies[]
          | select(.ref == $program."bom-ref" or (.ref as $ref | $known | index([$ref])))
          | { ref: (if .ref == $program."bom-ref" then $name else .ref end),
              dependsOn: [(.dependsOn // [])[] | select(. as $ref | $known | index([$ref]))] }] } ] as $rust_programs
  | ([$rust_programs[].crates[]] | unique_by(."bom-ref")) as $crates
  | ([$rust_programs[].program]) as $applications

  | [ $debian | lines[] | split("\t")
      | { source: .[0], source_version: .[1], name: .[2], version: .[3], where: (.[4] | split(" ")),
          ref: deb(.[2]; .[3]; "amd64") } ] as $packages
  | [ $packages | unique_by(.ref)[]
      | { type: "library", "bom-ref": .ref, supplier: { name: "Debian" }, name, version,
          purl: (.ref + "&upstream=\(.source | @uri)%40\(.source_version | purl)"),
          externalReferences: [{ type: "distribution",
            url: "https://snapshot.debian.org/package/\(.source | @uri)/\(.source_version | purl)/" }] } ] as $libraries
  | ($kernel | lines[0] | split("\t")) as [$linux, $linux_version]
  | ("pkg:generic/linux@" + ($linux_version | sub("-.*"; ""))) as $linux_ref
  | { type: "operating-system", "bom-ref": $linux_ref, name: "linux", version: ($linux_version | sub("-.*"; "")),
      purl: $linux_ref, licenses: [{ license: { id: "GPL-2.0-only" } }],
      pedigree: {
        ancestors: [{ type: "operating-system", name: $linux, version: $linux_version,
          purl: deb($linux; $linux_version; "source") }],
        notes: "licences/guest-kernel has the patches and the configuration." } } as $guest_kernel
  | ("pkg:generic/rust@" + $rust) as $std_ref
  | { type: "library", "bom-ref": $std_ref, name: "rust", version: $rust, purl: $std_ref,
      description: "The standard library of Rust", licenses: [{ expression: "MIT OR Apache-2.0" }] } as $std

  | [ $images | lines[] | split(" ") | { name: (.[1] | sub(":[^:/]*$"; "")), digest: .[2] }
      | select(.name | test("/charts/") | not)
      | { type: "container", "bom-ref": "\(.name)@\(.digest)", name, version: $version,
          purl: "pkg:oci/\(.name | sub(".*/"; ""))@\(.digest | @uri)?repository_url=\(.name | @uri)&tag=\($version)",
          hashes: [{ alg: "SHA-256", content: (.digest | sub("sha256:"; "")) }],
          licenses: [{ license: { id: $license } }] } ] as $containers
  | (["sandpod-operator"] as $in_operator
    | [ $containers[] | . as $image
        | { ref: ."bom-ref", dependsOn: (
            [$applications[] | select((.name | IN($in_operator[])) == ($image.name | endswith("/operator")))
              | ."bom-ref"]
            + if $image.name | endswith("/operator") then []
              else [$linux_ref, ($packages[] | select(.where[0] == "payload") | .ref)] end) } ]) as $holds
  # What is linked from archives.
  | [ $rust_programs[] | .program as $program | .dependencies[]
      | if .ref == $program."bom-ref" then .dependsOn += [$std_ref,
          ($packages[] | select(.where[0] == "all" or (.where | index([$program.name]))) | .ref)] else . end
    ] as $linked

  | { bomFormat: "CycloneDX", specVersion: "1.5", version: 1,
      metadata: {
        tools: ([$programs[].metadata.tools[]] | unique),
        component: { type: "application", "bom-ref": "sandpod@\($version)", name: "sandpod", version: $version,
          purl: "pkg:github/sandpod/sandpod@\($version)", licenses: [{ license: { id: $license } }] } },
      components: ($containers + $applications + $crates + $libraries + [$guest_kernel, $std]),
      dependencies: ([{ ref: "sandpod@\($version)", dependsOn: [$containers[]."bom-ref"] }] + $holds
        + ($linked | group_by(.ref) | map({ ref: .[0].ref, dependsOn: ([.[].dependsOn[]] | unique) }))) }'
