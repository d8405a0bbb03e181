#!/bin/bash
# The demonstration itself, as it runs on a host, emulated or not: what a person would type, and a table of what came of it.
#
# Arguments: the addresses of the devices to give away. From the environment:
#   KERNEL, INITRAMFS   what the guest boots; the guest's part of the demonstration is in the initramfs
#   WORK                a folder for what is written
#   URL, SHA256         data for the NIC to fetch, and its checksum; without them it gets an address and reaches its router
#   CPUS                how many processors the guest has; two without it
#   OVERWRITE=yes       drives may be written over; without it they are only read
set -euo pipefail

nic_bytes=${NIC_BYTES:-104857600}
disk_bytes=67108864
say() { printf '\n== %s\n' "$*"; }
run() { printf '   $ %s\n' "$*"; "$@"; }
now() { printf '%s' "${EPOCHREALTIME/./}"; }
rate() { awk -v bytes="$1" -v us="$2" 'BEGIN { printf "%.1f", bytes / us }'; } # BYTES MICROSECONDS: MB/s
word() { sed -n "s/.*\b$1=\([^ ]*\).*/\1/p" <<<"$2"; }                            # KEY LINE

cat >"$WORK/udhcpc" <<'END'
#!/bin/sh
[ "$1" != bound ] || ip addr add "$ip/$mask" dev "$interface"
END
chmod +x "$WORK/udhcpc"

class_of() { cut -c 3-6 "/sys/bus/pci/devices/$1/class"; }
drives=() nics=()
for address; do
    case $(class_of "$address") in
    0108) drives+=("$address") ;;
    0200) nics+=("$address") ;;
    *) echo "demo: $address is neither an NVMe drive nor a NIC (see: busway device list)" >&2; exit 2 ;;
    esac
done

given_back=
give_back() {
    [ -n "$given_back" ] || busway device unbind "$@" || true
    given_back=yes
    ip link del busway-demo 2>/dev/null || true
}

say "the host's devices"
run busway device list

declare -A host_rate host_sum
for address in "${drives[@]}"; do
    drive=/dev/$(basename "$(echo /sys/bus/pci/devices/"$address"/nvme/nvme*/nvme*n1)")
    if [ "${OVERWRITE:-}" = yes ]; then
        say "the host writes a pattern over $drive"
        host_rate[$address]=$(word mb_per_second "$(run lab-io write "$drive" 1 | tee /dev/stderr)")
    else
        say "the host reads the first 256 MiB of $drive"
        began=$(now)
        host_sum[$address]=$(head -c 256M "$drive" | sha256sum | cut -d ' ' -f 1)
        host_rate[$address]=$(rate 268435456 $(($(now) - began)))
    fi
done
for address in "${nics[@]}"; do
    host_rate[$address]=-
    [ -n "${URL:-}" ] || continue
    nic=$(basename "$(echo /sys/bus/pci/devices/"$address"/net/*)")
    say "the host fetches $((nic_bytes / 1048576)) MiB through $nic"
    ip link set "$nic" up
    busybox udhcpc -q -n -t 20 -i "$nic" -s "$WORK/udhcpc" >/dev/null 2>&1
    began=$(now)
    sum=$(curl -sf --interface "$nic" "$URL" | sha256sum | cut -d ' ' -f 1)
    host_rate[$address]=$(rate "$nic_bytes" $(($(now) - began)))
    [ "$sum" = "$SHA256" ] || { echo "demo: the host itself fetched wrong data through $nic" >&2; exit 1; }
    ip addr flush dev "$nic"
    ip link set "$nic" down
done

say "a virtio disk and a virtio NIC, for comparison"
truncate -s "$disk_bytes" "$WORK/disk.raw"
host_rate[disk]=$(word mb_per_second "$(run lab-io write "$WORK/disk.raw" 1 | tee /dev/stderr)")
ip tuntap add dev busway-demo mode tap
ip addr add 192.168.77.1/24 dev busway-demo
ip link set busway-demo up
mkdir -p "$WORK/www"
head -c "$nic_bytes" /dev/urandom >"$WORK/www/data"
tap_sum=$(sha256sum "$WORK/www/data" | cut -d ' ' -f 1)
busybox httpd -f -p 192.168.77.1:8077 -h "$WORK/www" &
httpd=$!
trap 'kill $httpd 2>/dev/null || true; give_back "$@"' EXIT
began=$(now)
[ "$(curl -sf --retry 20 --retry-connrefused --retry-delay 1 http://192.168.77.1:8077/data | sha256sum | cut -d ' ' -f 1)" = "$tap_sum" ]
host_rate[tap]=$(rate "$nic_bytes" $(($(now) - began)))

say "the devices leave their drivers"
run busway device bind "$@"

say "a guest has all four"
devices=()
for address; do devices+=(--device "$address"); done
cat >"$WORK/guest.env" <<END
url='${URL:-}' sha256='${SHA256:-}' tap_url=http://192.168.77.1:8077/data tap_sha256=$tap_sum nic_bytes=$nic_bytes overwrite='${OVERWRITE:-}'
END
(cd "$WORK" && echo guest.env | busybox cpio -o -H newc 2>/dev/null | cat "$INITRAMFS" - >"$WORK/initramfs")
status=0
run busway run --kernel "$KERNEL" --initramfs "$WORK/initramfs" --cmdline 'console=ttyS0 quiet panic=-1' \
    --cpus boot="${CPUS:-2}" --memory size=512M --disk path="$WORK/disk.raw" --net tap=busway-demo "${devices[@]}" \
    --report "$WORK/report.json" -v </dev/null | tee "$WORK/console" || status=$?
[ "$status" = 0 ] || { echo "demo: busway ended with status $status" >&2; exit 1; }

say "the devices go back to the host"
given_back=yes
run busway device unbind "$@"
value() { tr -d '\r' <"$WORK/console" | sed -n "s/.*@@value $1 //p" | tail -n 1; }
declare -A verdict
for address in "${drives[@]}"; do
    busybox timeout 60 sh -c "until [ -e /sys/bus/pci/devices/$address/nvme/nvme*/nvme*n1 ]; do busybox usleep 100000; done"
    drive=/dev/$(basename "$(echo /sys/bus/pci/devices/"$address"/nvme/nvme*/nvme*n1)")
    verdict[$address]="FAILED"
    if [ "${OVERWRITE:-}" = yes ]; then
        say "the host reads from $drive what the guest wrote"
        run lab-io verify "$drive" 2 && verdict[$address]="pattern, both ways"
    elif [ "$(value drive_sum)" = "${host_sum[$address]}" ]; then
        verdict[$address]="first 256 MiB, read"
    fi
done
for address in "${nics[@]}"; do
    case $(value nic_sum) in
    "") verdict[$address]=FAILED ;;
    "${SHA256:-}") verdict[$address]="$((nic_bytes / 1048576)) MiB by SHA-256" ;;
    router) verdict[$address]="address, router" ;;
    *) verdict[$address]=FAILED ;;
    esac
done
verdict[disk]=FAILED
lab-io verify "$WORK/disk.raw" 2 >/dev/null && verdict[disk]="pattern, both ways"
verdict[tap]=FAILED
[ "$(value tap_sum)" = "$tap_sum" ] && verdict[tap]="$((nic_bytes / 1048576)) MiB by SHA-256"

say "what was seen"
row() { printf '%-24s %-9s %-11s %-20s %-20s %9s %9s\n' "$@"; }
row device "in guest" driver interrupts verified "guest MB/s" "host MB/s"
for address in "${drives[@]}"; do
    row "$address NVMe" "$(value drive_name)" "$(value drive_driver)" "$(value drive_irqs)" "${verdict[$address]}" "$(value drive_rate)" "${host_rate[$address]}"
done
for address in "${nics[@]}"; do
    row "$address NIC" "$(value nic_name)" "$(value nic_driver)" "$(value nic_irqs)" "${verdict[$address]}" "$(value nic_rate)" "${host_rate[$address]}"
done
row "virtio disk" "$(value disk_name)" "$(value disk_driver)" "$(value disk_irqs)" "${verdict[disk]}" "$(value disk_rate)" "${host_rate[disk]}"
row "virtio NIC" "$(value tap_name)" "$(value tap_driver)" "$(value tap_irqs)" "${verdict[tap]}" "$(value tap_rate)" "${host_rate[tap]}"
for each in "${verdict[@]}"; do [ "$each" != FAILED ] || exit 1; done
