# The guest's part of the demonstration, run by guest-init: finds its four devices, moves verified data through each.
. /guest.env

irqs() { # SYSFS_DEVICE: how many vectors it has, and how often they came
    count=0 vectors=0
    for irq in $(ls "$1/msi_irqs" 2>/dev/null); do
        vectors=$((vectors + 1))
        count=$((count + $(awk -v irq="$irq:" '$1 == irq { for (i = 2; $i ~ /^[0-9]+$/; i++) n += $i } END { print n + 0 }' /proc/interrupts)))
    done
    echo "$count on $vectors vectors"
}
driver() { basename "$(readlink "$1/driver")"; }
word() { sed -n "s/.*\b$1=\([^ ]*\).*/\1/p"; }
seconds() { cut -d ' ' -f 1 /proc/uptime; }

drive() { # ROLE NAME: the host's pattern is read, and another written
    role=$1 name=$2 device=/sys/class/block/$2/device
    [ -e "$device/driver" ] || device=$device/device
    value "${role}_name" "$name"
    value "${role}_driver" "$(driver "$device")"
    [ -d "$device/msi_irqs" ] || device=$device/..
    if [ "$role" = disk ] || [ "$overwrite" = yes ]; then
        lab-io verify "/dev/$name" 1
        value "${role}_rate" "$(lab-io write "/dev/$name" 2 | word mb_per_second)"
    else
        began=$(seconds)
        value "${role}_sum" "$(head -c 268435456 "/dev/$name" | sha256sum | cut -d ' ' -f 1)"
        value "${role}_rate" "$(awk -v began="$began" -v ended="$(seconds)" 'BEGIN { printf "%.1f", 268.4 / (ended - began) }')"
    fi
    value "${role}_irqs" "$(irqs "$device")"
}

nic() { # ROLE NAME URL SHA256
    role=$1 name=$2 device=/sys/class/net/$2/device
    value "${role}_name" "$name"
    value "${role}_driver" "$(driver "$device")"
    if [ -n "$3" ]; then
        began=$(seconds)
        value "${role}_sum" "$(wget -q -O - "$3" | sha256sum | cut -d ' ' -f 1)"
        value "${role}_rate" "$(awk -v bytes="$nic_bytes" -v began="$began" -v ended="$(seconds)" 'BEGIN { printf "%.1f", bytes / 1e6 / (ended - began) }')"
    else
        ping -c 3 "$(ip route | sed -n 's/^default via \([^ ]*\).*/\1/p' | head -n 1)" && value "${role}_sum" router
        value "${role}_rate" -
    fi
    [ -d "$device/msi_irqs" ] || device=$device/..
    value "${role}_irqs" "$(irqs "$device")"
}

cat >/tmp/udhcpc <<'END'
#!/bin/sh
case $1 in bound | renew) ip addr add "$ip/$mask" dev "$interface"; [ -z "$router" ] || ip route add default via $router dev "$interface" ;; esac
END
chmod +x /tmp/udhcpc

for each in /sys/class/block/nvme*n1; do
    [ ! -e "$each" ] || drive drive "$(basename "$each")"
done
drive disk vda
for each in /sys/class/net/*; do
    [ -e "$each/device" ] || continue
    name=$(basename "$each")
    ip link set "$name" up
    case $(driver "$each/device") in
    virtio_net)
        ip addr add 192.168.77.2/24 dev "$name"
        nic tap "$name" "$tap_url" "$tap_sha256"
        ;;
    *)
        udhcpc -q -n -t 20 -i "$name" -s /tmp/udhcpc
        nic nic "$name" "$url" "$sha256"
        ;;
    esac
done
