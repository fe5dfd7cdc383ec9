#!/usr/bin/env bash
# enter_arm64.sh ROOT QEMU CPU SESSION COMMAND...: an aarch64 program in ROOT, by QEMU's user mode.
# Run in new user, mount and pid namespaces: the kernel's binfmt_misc belongs to the user namespace
# (Linux 6.7 and later), so nothing of this machine changes. SESSION is seen at its own path.
set -euo pipefail
root=$1 qemu=$2 cpu=$3 session=$4
shift 4
mount --make-rprivate /
mount --bind "$root" "$root" # its mounts end with this namespace
mount -t proc proc "$root/proc"
mount --rbind /dev "$root/dev"
mount --rbind /sys "$root/sys"
mount -t tmpfs tmpfs "$root/srv"
mkdir -p "$root/srv/session"
mount --bind "$session" "$root/srv/session"
mount -t binfmt_misc none "$root/proc/sys/fs/binfmt_misc"
magic='\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00'
mask='\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff'
# F: the interpreter is opened now, so it need not be in ROOT.
echo ":qemu-aarch64:M::$magic:$mask:$qemu:OCF" > "$root/proc/sys/fs/binfmt_misc/register"
# No exec: this shell stays process 1, for a crashed qemu as process 1 would hang for ever.
chroot "$root" /usr/bin/env -i PATH=/usr/bin HOME=/srv/session TMPDIR=/srv QEMU_CPU="$cpu" \
    LANG=C.UTF-8 OMP_NUM_THREADS=1 "$@" || exit $?
