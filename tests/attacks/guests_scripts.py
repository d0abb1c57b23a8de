"""What runs in the guest that is attacked: two writers that remember what they wrote, and what the host asks of them.

Both are shell scripts. They keep their words in memory (/run): the sum of what a file or a slot holds, once the call
that wrote it has returned. The host reads the sums over the serial port, also while the disk's server is down.
"""

from __future__ import annotations

from collections.abc import Mapping

RING_SLOTS = 32
FSYNCED_BYTES, MIXED_BLOCK_BYTES, MIXED_SLOT_BYTES = 24 * 1024, 4096, 64 * 1024
REMOVED_EVERY = 4
"""Of so many fsynced files one is removed, two rounds after it was written."""

BEGIN = """
trouble() { echo "$0: $1" >> /run/trouble; exit 1; }
keep() { echo "$2" > /run/new.$3; mv /run/new.$3 /run/sums/$1; }
"""

# Every byte is fsynced before it is remembered: new files, slots of one file that are overwritten in place, and files
# that are removed again, which `discard` turns into trims.
FSYNCING = f"""{BEGIN}
number=$(cat /run/rounds)
while [ ! -e /run/stop ]; do
    number=$((number + 1))
    slot=$((number % {RING_SLOTS}))
    dd if=/dev/urandom of=/run/piece bs={FSYNCED_BYTES} count=1 || trouble "no random bytes"
    sum=$(md5sum < /run/piece)
    dd if=/run/piece of=/mnt/file.$number bs={FSYNCED_BYTES} conv=fsync || trouble "file.$number cannot be written"
    keep file.$number "$sum" a
    rm -f /run/sums/slot.$slot
    dd if=/run/piece of=/mnt/slots bs={FSYNCED_BYTES} seek=$slot conv=notrunc,fsync || trouble "slot $slot is unwritten"
    keep slot.$slot "$sum" a
    if [ $((number % {REMOVED_EVERY})) = 0 ]; then
        rm /run/sums/file.$((number - 2)) /mnt/file.$((number - 2)) || trouble "file.$((number - 2)) is not there"
    fi
    echo $number > /run/rounds.new
    mv /run/rounds.new /run/rounds
done
touch /run/ended.1
"""

# Nothing is fsynced: O_DIRECT, whose writes are answered and not flushed; the guest's cache; and O_DIRECT in place.
MIXED = f"""{BEGIN}
number=$(cat /run/mixed)
while [ ! -e /run/stop ]; do
    number=$((number + 1))
    slot=$((number % {RING_SLOTS}))
    size=$((({MIXED_BLOCK_BYTES} * (1 + number * 7 % 16))))
    dd if=/dev/urandom of=/run/other bs=$size count=1 || trouble "no random bytes"
    sum=$(md5sum < /run/other)
    case $((number % 3)) in
        0) dd if=/run/other of=/mnt/direct.$number bs=$size oflag=direct || trouble "direct.$number cannot be written"
           keep direct.$number "$sum" b ;;
        1) dd if=/run/other of=/mnt/cached.$number bs=$size || trouble "cached.$number cannot be written"
           keep cached.$number "$sum" b ;;
        2) rm -f /run/sums/ring.$slot
           dd if=/run/other of=/mnt/ring.$slot bs=$size conv=notrunc oflag=direct || trouble "ring.$slot is unwritten"
           keep ring.$slot "$size $sum" b ;;
    esac
    if [ $((number % 9)) = 0 ]; then
        rm /run/sums/direct.$((number - 3)) /mnt/direct.$((number - 3)) || trouble "direct.$((number - 3)) is gone"
    fi
    echo $number > /run/mixed.new
    mv /run/mixed.new /run/mixed
done
touch /run/ended.2
"""

MAKE = {"ext4": "mkfs.ext4 -q /dev/vda", "xfs": "mkfs.xfs -q -f /dev/vda"}
PREPARE = f"""
mkdir -p /run/sums && echo 0 > /run/rounds && echo 0 > /run/mixed && : > /run/trouble || exit 1
echo 100 > /proc/sys/vm/dirty_writeback_centisecs && echo 200 > /proc/sys/vm/dirty_expire_centisecs || exit 1
cat > /run/fsyncing <<'END'
{FSYNCING}END
cat > /run/mixing <<'END'
{MIXED}END
"""
MOUNT = "mount -o discard /dev/vda /mnt"
WORK = f"{MOUNT} || exit 1; rm -f /run/stop /run/ended.*; sh /run/fsyncing 2> /run/e1 & sh /run/mixing 2> /run/e2 &"
STOP = "touch /run/stop"
HAVE_ENDED = "[ -e /run/ended.1 ] && [ -e /run/ended.2 ] && echo ended || cat /run/trouble"
PROGRESS = "cat /run/rounds /run/trouble"
UNMOUNT = "umount /mnt"
SUMS = "cd /run/sums && grep -H . * || true"
SUMS_OF_FSYNCED = "cd /run/sums && grep -H . file.* 2> /dev/null || true"
MOUNT_ANEW = f"{MOUNT} && echo 3 > /proc/sys/vm/drop_caches"
LOOK = f"""
cd /mnt || exit 1
for name in file. direct. cached.; do
    find . -maxdepth 1 -name "$name*" | xargs md5sum
done
for slot in $(seq 0 {RING_SLOTS - 1}); do
    [ -e slots ] && echo "$(dd if=slots bs={FSYNCED_BYTES} skip=$slot count=1 2> /dev/null | md5sum) slot.$slot"
    if [ -e /run/sums/ring.$slot ]; then
        read size rest < /run/sums/ring.$slot
        echo "$(dd if=ring.$slot bs=$size count=1 2> /dev/null | md5sum) ring.$slot"
    fi
done
"""


def remembered(text: str) -> dict[str, str]:
    """Parse what SUMS printed: the MD5 sum by the name of the file or slot."""
    found = {}
    for line in text.splitlines():
        name, _, words = line.partition(":")
        sums = [word for word in words.split() if len(word) == 32]
        if sums:
            found[name] = sums[0]
    return found


def seen(text: str) -> dict[str, str]:
    """Parse what LOOK printed, likewise."""
    lines = (line.split() for line in text.splitlines())
    return {words[-1].removeprefix("./"): words[0] for words in lines if len(words) >= 2 and len(words[0]) == 32}


def lasting(sums: Mapping[str, str]) -> dict[str, str]:
    """Leave out fsynced files that their writer may be removing by now."""
    return {name: each for name, each in sums.items() if (number_of(name) + 2) % REMOVED_EVERY}


def number_of(name: str) -> int:
    """Return the number behind the dot."""
    return int(name.partition(".")[2])


def differences(wanted: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """Say what of ``wanted`` is not there as it should be; the first few."""
    wrong = [name for name, each in sorted(wanted.items()) if found.get(name) != each]
    said = [f"{name} is {'not what was written' if name in found else 'gone'}" for name in wrong[:3]]
    return [*said, f"{len(wrong)} of {len(wanted)} in all"] if wrong else []
