#!/bin/busybox sh
# The first process of a guest: mounts the host's root, of which the guest sees a copy that it may change, and
# goes on there with /run.sh.
export PATH=/bin
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t devtmpfs dev /dev
for module in /modules/*; do
    insmod "$module" || echo "failed to load $module" > /dev/ttyS1
done
mount -t 9p -o trans=virtio,version=9p2000.L,ro,msize=524288,cache=loose host /host
mount -t tmpfs tmpfs /rw
mkdir /rw/upper /rw/work
mount -t overlay -o lowerdir=/host,upperdir=/rw/upper,workdir=/rw/work overlay /root
mount -t proc proc /root/proc
mount -t sysfs sys /root/sys
mount -t devtmpfs dev /root/dev
mount -t tmpfs tmpfs /root/run
cp /run.sh /root/run/run.sh
umount /proc
exec switch_root /root /bin/sh /run/run.sh
