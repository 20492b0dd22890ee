#!/usr/bin/env bash
# The first process in the namespaces of run.sh: makes a root folder of $ROOT and runs the command there, at $WHERE.
# $BINDS and $TOOLS are folders of the machine and their places (<folder>=<place>), the latter to be read only; standard
# input has the command's variables (<name>=<value>). Each is a line.
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
# Of each cgroup hierarchy our own part only, in the place of the whole.
if ! grep -qx /sys/fs/cgroup <<<"$HIERARCHIES"; then
  mount -t tmpfs -o mode=755 tmpfs sys/fs/cgroup
  find /sys/fs/cgroup -maxdepth 1 -type l -exec cp -P -t sys/fs/cgroup {} +
fi
for hierarchy in $HIERARCHIES; do
  mkdir -p ".$hierarchy"
  mount --bind "$hierarchy/${FOLDER##*/}" ".$hierarchy"
done
# In cgroup v2 a cgroup that hands controllers on has no processes itself (cgroups(7), "no internal processes").
if [ -s sys/fs/cgroup/cgroup.controllers ]; then
  mkdir sys/fs/cgroup/first
  echo 0 >sys/fs/cgroup/first/cgroup.procs
  for controller in $(<sys/fs/cgroup/cgroup.controllers); do
    echo "+$controller" >sys/fs/cgroup/cgroup.subtree_control
  done
fi

bind() {
  mkdir -p ".${1#*=}"
  mount --bind "${1%%=*}" ".${1#*=}"
}
for pair in $BINDS; do bind "$pair"; done
for pair in $TOOLS; do
  bind "$pair"
  mount -o remount,bind,ro ".${pair#*=}"
done
cat /etc/resolv.conf >etc/resolv.conf
echo "127.0.0.1 localhost fresh" >etc/hosts

pivot_root . mnt
cd "$WHERE"
umount -l /mnt
code=0
env -i "${variables[@]}" "$@" || code=$?
exit "$code"
