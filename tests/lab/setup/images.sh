# The initramfs images, not compressed, because unpacking under emulation is slow. Sourced, after kernel.sh.

# What guests load by the alias of each device that they find.
guest_modules=(
    nvme e1000 e1000e igb igbvf 8139cp xhci-pci sd_mod usb-storage snd-hda-intel snd-hda-codec-generic snd-pcm-oss
    virtio_blk virtio_net virtiofs virtio_console virtio-rng virtio_balloon virtio_mem vmw_vsock_virtio_transport ext4 uio_pci_generic
    vfio-pci evdev button efivarfs i6300esb pvpanic-pci virtio_pmem nd_pmem
)
# Programs of the root that guests can ask for, with their libraries.
guest_programs=(usr/bin/fio usr/bin/lspci usr/bin/socat usr/sbin/ethtool)

# pack DIR IMAGE
pack() {
    (cd "$1" && find . -mindepth 1 | LC_ALL=C sort | cpio --quiet -o -H newc -R 0:0) >"$2"
    rm -r "$1"
}

# pack_programs ROOT IMAGE PROGRAM…: programs of a root, with their libraries.
pack_programs() {
    local from=$1 image=$2 tree=$2.tree file
    shift 2
    mkdir "$tree"
    # ldd names a program itself only where it is asked about several.
    { printf '/%s\n' "$@"; as_root chroot "$from" ldd "${@/#//}" | grep -o '/[^ :]*'; } | sort -u | while read -r file; do
        install -D "$from/$(as_root chroot "$from" realpath "$file")" "$tree/$file"
    done
    pack "$tree" "$image"
}

# with_modules DIR KERNEL MODULE…: modules of a kernel's folder, with what they stand on.
with_modules() {
    local dir=$1 kernel=$2 release each file
    shift 2
    release=$(ls "$kernel/lib/modules")
    mkdir -p "$dir/lib/modules/$release"
    cp "$kernel/lib/modules/$release"/modules.{builtin,builtin.modinfo,order} "$dir/lib/modules/$release/"
    for each in "$@"; do
        modprobe -d "$kernel" -S "$release" --show-depends "$each" || [ "$each" = crc32c_generic ]
    done | awk '$1 == "insmod" { print $2 }' | sort -u | while read -r file; do
        each=$dir/lib/modules/$release/${file#*"/modules/$release/"}
        mkdir -p "${each%/*}"
        cp "$file" "$each"
    done
    depmod -b "$dir" "$release"
}

# make_host_image KERNEL IMAGE
make_host_image() {
    local tree=$2.tree
    mkdir -p "$tree/bin"
    cp "$root/usr/bin/busybox" "$tree/bin/"
    install -m 755 "$setup_dir/host-init" "$tree/init"
    with_modules "$tree" "$1" virtio_pci virtio_blk crc32c_generic erofs overlay
    pack "$tree" "$2"
}

make_images() {
    local dir=$1 tree=$1/tree
    make_host_image "$stock" "$dir/host-stock.img"
    [ -z "$backports" ] || make_host_image "$backports" "$dir/host-backports.img"

    mkdir -p "$tree/bin"
    cp "$root/usr/bin/busybox" "$tree/bin/"
    install -m 755 "$setup_dir/guest-init" "$tree/init"
    with_modules "$tree" "$stock/iommufd" "${guest_modules[@]}"
    pack "$tree" "$dir/guest.img"

    pack_programs "$root" "$dir/guest-programs.img" "${guest_programs[@]}"

    # For guests that measure networks or bridge them. The bridge is loaded by insmod, in this order, so that no list of the
    # kernel's modules is another in the guests that have it.
    mkdir -p "$tree/lib/bridge"
    local release number=0 file
    release=$(ls "$stock/iommufd/lib/modules")
    modprobe -d "$stock/iommufd" -S "$release" --show-depends bridge | awk '$1 == "insmod" { print $2 }' | while read -r file; do
        number=$((number + 1))
        cp "$file" "$tree/lib/bridge/$number-${file##*/}"
    done
    pack "$tree" "$dir/bridge.img"
    # iperf3 ends its threads by what the last of these has, and finds that only then.
    pack_programs "$root" "$dir/iperf3.img" usr/bin/iperf3 usr/lib/x86_64-linux-gnu/libgcc_s.so.1
    cat "$dir"/{bridge,iperf3}.img >"$dir/guest-net.img"
    rm "$dir"/{bridge,iperf3}.img
}

images=$cache/images-$(key "${root##*/}" "${stock##*/}" "${backports##*/}" "$setup_dir"/{images.sh,host-init,guest-init})
