# The three initramfs images, not compressed, because unpacking under emulation is slow. Sourced, after stock.sh.

# What guests load by the alias of each device that they find.
guest_modules=(nvme e1000 e1000e igb igbvf 8139cp virtio_blk virtio_net virtio-rng virtio_balloon ext4 uio_pci_generic msr)
# Programs of the root that guests can ask for, with their libraries.
guest_programs=(usr/bin/fio usr/bin/lspci)

# pack DIR IMAGE
pack() {
    (cd "$1" && find . -mindepth 1 | LC_ALL=C sort | cpio --quiet -o -H newc -R 0:0) >"$2"
    rm -r "$1"
}

# with_modules DIR MODULE…: the stock kernel's modules, with what they stand on.
with_modules() {
    local dir=$1 release each file
    shift
    release=$(cat "$stock/release")
    mkdir -p "$dir/lib/modules/$release"
    cp "$stock/lib/modules/$release"/modules.{builtin,builtin.modinfo,order} "$dir/lib/modules/$release/"
    for each in "$@"; do
        modprobe -d "$stock" -S "$release" --show-depends "$each"
    done | awk '$1 == "insmod" { print $2 }' | sort -u | while read -r file; do
        each=$dir/lib/modules/$release/${file#*"/modules/$release/"}
        mkdir -p "${each%/*}"
        cp "$file" "$each"
    done
    depmod -b "$dir" "$release"
}

make_images() {
    local dir=$1 tree=$1/tree
    mkdir -p "$tree/bin"
    cp "$root/usr/bin/busybox" "$tree/bin/"
    install -m 755 "$setup_dir/host-init" "$tree/init"
    install -m 755 "$setup_dir/host-agent" "$tree/agent"
    with_modules "$tree" 9pnet_virtio 9p overlay
    pack "$tree" "$dir/host.img"

    mkdir -p "$tree/bin"
    cp "$root/usr/bin/busybox" "$tree/bin/"
    install -m 755 "$setup_dir/guest-init" "$tree/init"
    with_modules "$tree" "${guest_modules[@]}"
    pack "$tree" "$dir/guest.img"

    mkdir -p "$tree"
    as_root chroot "$root" ldd "${guest_programs[@]/#//}" | grep -o '/[^ :]*' | sort -u | while read -r file; do
        install -D "$root/$(as_root chroot "$root" realpath "$file")" "$tree/$file"
    done
    pack "$tree" "$dir/guest-programs.img"
}

images=$cache/images-$(key "${root##*/}" "${stock##*/}" "$setup_dir"/{images.sh,host-init,host-agent,guest-init})
