# Runs the tests of the list below in a guest and switches it off. The second serial line is for what the tests
# say; the last line there is how many of the test programs failed.
exec > /dev/ttyS1 2>&1
mkdir -p /dev/shm /run/netns /run/weft
mount -t tmpfs tmpfs /dev/shm
mount -t bpf bpf /sys/fs/bpf
[ -d /sys/fs/cgroup ] && mount -t cgroup2 cgroup /sys/fs/cgroup
mkdir -p "/lib/modules/$(uname -r)"
mount --bind "$MODULES" "/lib/modules/$(uname -r)"
ip link set lo up
cd "$ROOT" || echo "no $ROOT"
echo "weft-vm: Linux $(uname -r)"
failed=0
while read -r program; do
    echo "weft-vm: $program"
    "$program" --ignored --test-threads=1 --color=never $FILTER < /dev/null || failed=$((failed + 1))
done < /run/weft/tests
echo "weft-vm: $failed failed"
sync
echo o > /proc/sysrq-trigger
sleep 60
