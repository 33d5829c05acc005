#!/bin/bash
# Init of one node of the test cluster, in its own net, mount, uts, ipc and pid namespaces:
# cluster_node.sh NAME ADDRESS ROLE CLUSTER_DIRECTORY CGROUP
set -eu
name=$1 address=$2 role=$3 lab=$4 cgroup=$5 own=$4/nodes/$1
hostname "$name"
# Mounts of other tests, copied with the namespace, are not this machine's.
mapfile -t points < <(cut -d' ' -f2 /proc/self/mounts)
for point in "${points[@]}"; do
    case $point in /var/tmp/* | /tmp/* | /home/* | /mnt/*) umount -i -l "$(printf '%b' "$point")" || true ;; esac
done
ip link set lo up
over() { mount --bind "$1" "$2"; }
mkdir -p "$own"/var/{lib-slurm/slurmctld,lib-slurm/slurmd,lib-sdee,log-slurm,log-munge,lib-munge,cache-sdee} "$own"/tmp
chown slurm:slurm "$own"/var/lib-slurm/slurmctld "$own"/var/log-slurm
chown munge:munge "$own"/var/{log-munge,lib-munge}
chmod 700 "$own"/var/{log-munge,lib-munge}
chmod 1777 "$own"/tmp
mount -t tmpfs -o mode=755 tmpfs /run
mkdir -p /run/munge /run/slurm /run/lock /run/user
chown munge:munge /run/munge
over "$own"/var/lib-slurm /var/lib/slurm
over "$own"/var/log-slurm /var/log/slurm
over "$own"/var/log-munge /var/log/munge
over "$own"/var/lib-munge /var/lib/munge
over "$own"/var/lib-sdee /var/lib/sdee
over "$lab"/etc-slurm /etc/slurm
over "$lab"/etc-munge /etc/munge
over "$lab"/etc-sdee /etc/sdee
over "$lab"/hosts /etc/hosts
over "$own"/tmp /tmp
# A fresh sysfs shows this namespace's network; Slurm needs the cgroup mounts under it, and gets
# a directory of the cluster's own in each hierarchy, so that one rmdir takes all away.
controllers=()
for directory in /sys/fs/cgroup/*/; do
    controller=$(basename "$directory")
    [ -d "$directory$cgroup" ] && controllers+=("$controller")
done
mkdir -p /run/cgroups
for controller in "${controllers[@]}"; do
    mkdir -p "/run/cgroups/$controller" "/sys/fs/cgroup/$controller/$cgroup/$name"
    mount --bind "/sys/fs/cgroup/$controller/$cgroup/$name" "/run/cgroups/$controller"
done
umount -l -R /sys
mount -t sysfs sysfs /sys
mount -t tmpfs -o mode=755 tmpfs /sys/fs/cgroup
for controller in "${controllers[@]}"; do
    mkdir "/sys/fs/cgroup/$controller"
    mount --move "/run/cgroups/$controller" "/sys/fs/cgroup/$controller"
done
until ip link show eth0 >/dev/null 2>&1; do sleep 0.01; done
ip addr add "$address"/24 dev eth0
ip link set eth0 up
setpriv --reuid=munge --regid=munge --clear-groups munged --num-threads=2
case $role in
    controller) slurmctld -c ;;
    compute) slurmd -N "$name" ;;
esac
touch /run/node-is-up
set +e
trap 'exit 0' TERM
while :; do sleep 1000 & wait $!; done
