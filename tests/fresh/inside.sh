#!/usr/bin/env bash
# The first process of run.sh's namespaces: mounts what a machine has, makes $FOLDER/root the root, and runs the command. Standard input has its environment, a variable per line.
set -euo pipefail
mapfile -t variables
exec </dev/null
hostname fresh
mount -t overlay overlay -o "lowerdir=$ROOT,upperdir=$FOLDER/changed,workdir=$FOLDER/work" "$FOLDER/root"
cd "$FOLDER/root"

mount -t proc proc proc
mount -t sysfs sysfs sys
mount --rbind /dev dev
mount -t tmpfs -o mode=1777 tmpfs dev/shm
mount -t tmpfs -o mode=755 tmpfs run
mkdir run/lock
# Of the cgroups only what is ours, in the places of the whole.
if ! grep -qx /sys/fs/cgroup <<<"$HIERARCHIES"; then
  mount -t tmpfs -o mode=755 tmpfs sys/fs/cgroup
  find /sys/fs/cgroup -maxdepth 1 -type l -exec cp -P -t sys/fs/cgroup {} +
fi
for hierarchy in $HIERARCHIES; do
  mkdir -p ".$hierarchy"
  mount --bind "$hierarchy/${FOLDER##*/}" ".$hierarchy"
done
# cgroup v2 has controllers only for cgroups beside which there is no process (cgroups(7), "no internal processes").
if [ -s sys/fs/cgroup/cgroup.controllers ]; then
  mkdir sys/fs/cgroup/first
  echo 0 >sys/fs/cgroup/first/cgroup.procs
  for controller in $(<sys/fs/cgroup/cgroup.controllers); do echo "+$controller" >sys/fs/cgroup/cgroup.subtree_control; done
fi

# Containers' root folders are overlays, and such cannot be on one: what grows is in folders of the machine's file system.
mkdir -p opt/{rust,go} root/sandpod var/cache/sandpod
mount --bind "$FOLDER/tmp" tmp
mount --bind "$FOLDER/var-tmp" var/tmp
mount --bind "$FOLDER/home" root
mkdir -p root/sandpod
mount --bind "$FOLDER/checkout" root/sandpod
mount --bind "$CACHE" var/cache/sandpod
for tool in rust go; do
  folder=${tool^^}
  mount --bind "${!folder}" opt/$tool
  mount -o remount,bind,ro opt/$tool
done
cat /etc/resolv.conf >etc/resolv.conf
echo "127.0.0.1 localhost fresh" >etc/hosts

pivot_root . mnt
cd /root/sandpod
umount -l /mnt
code=0
env -i "${variables[@]}" "$@" || code=$?
exit "$code"
