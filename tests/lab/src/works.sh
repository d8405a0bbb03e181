# What the works share, in the guest; after guest-init's own functions.

# at VENDOR:DEVICE: the addresses of a kind of device, of those that are a slot's first function.
at() {
    for each in /sys/bus/pci/devices/*.0; do
        if [ "$(cat "$each/vendor"):$(cat "$each/device")" = "0x${1%:*}:0x${1#*:}" ]; then basename "$each"; fi
    done
}

# ivshmem plain|doorbell: the address of the one without vectors, or with them. They differ in BAR 1.
ivshmem() {
    for each in $(at 1af4:1110); do
        case $(sed -n 2p "/sys/bus/pci/devices/$each/resource") in
        0x0000000000000000*) [ "$1" != plain ] || echo "$each" ;;
        *) [ "$1" != doorbell ] || echo "$each" ;;
        esac
    done
}

# drive SERIAL: the NVMe controller's name.
drive() {
    for each in /sys/class/nvme/*; do
        case $(cat "$each/serial") in "$1"*) basename "$each" ;; esac
    done
}

# interrupts ADDRESS: their kind, and how many the kernel has counted.
interrupts() {
    kind=intx lines=$(cat "/sys/bus/pci/devices/$1/irq")
    if [ -n "$(ls "/sys/bus/pci/devices/$1/msi_irqs" 2>/dev/null)" ]; then
        lines=$(ls "/sys/bus/pci/devices/$1/msi_irqs")
        kind=$(cat "/sys/bus/pci/devices/$1/msi_irqs/"* | head -n 1)
    fi
    echo "kind=$kind count=$(awk -v lines=" $(echo $lines) " -v cpus="$(nproc)" '
        { sub(":", "", $1) }
        index(lines, " " $1 " ") { for (i = 2; i < cpus + 2; i++) sum += $i }
        END { print sum + 0 }' /proc/interrupts)"
}

# face NAME ADDRESS: the driver, and the interrupts up to now.
face() {
    value "$1.driver" "$(basename "$(readlink "/sys/bus/pci/devices/$2/driver")")"
    value "$1.interrupts" "$(interrupts "$2")"
}

# appear PATTERN: waits until a driver that probes on its own has made a file of such a name.
# Without a process for each look: several wait at once, on few processors.
appear() {
    until for each in $1; do [ -e "$each" ] && break; done; do sleep 0.1; done
}

# disk NAME DEVICE SEED: the pattern over the whole of it, and back.
disk() {
    value "$1.write" "$(lab-io write "$2" "$3")"
    value "$1.verify" "$(lab-io verify "$2" "$3")"
}

# nic NAME ADDRESS URL GATEWAY PORT: takes a network address, fetches and sends the same bytes, and leaves the
# network to the next one: all of them have the same addresses.
nic() {
    appear "/sys/bus/pci/devices/$2/net"
    port=$(ls "/sys/bus/pci/devices/$2/net")
    value "$1.mac" "$(cat "/sys/class/net/$port/address")"
    dhcp "$port"
    wget -q -O "/tmp/$1" "$3"
    value "$1.sum" "$(sha256sum <"/tmp/$1" | cut -d ' ' -f 1)"
    value "$1.echoed" "$(upload "$4" "$5" "/tmp/$1")"
    rm "/tmp/$1"
    face "$1" "$2"
    ip address flush dev "$port"
    ip link set "$port" down
}

# work NAME SECONDS: runs the function work_NAME, and says how it ended.
work() {
    (
        set -e
        "work_$1"
    ) &
    pid=$!
    (
        sleep "$2"
        kill "$pid" 2>/dev/null
    ) &
    guard=$!
    ended=0
    wait "$pid" || ended=$?
    kill "$guard" 2>/dev/null || true
    value "$1.status" "$ended"
}
