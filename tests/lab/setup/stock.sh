# Debian's stock kernel, taken out of its package and never installed: host and guest. Sourced, after root.sh.

# What the emulated host and the guests load. Only these are kept, unpacked, with what they depend on.
stock_modules=(
    9p 9pnet_virtio overlay virtio_pci virtio_blk virtio_net virtio_console virtio-rng virtio_balloon vsock
    vmw_vsock_virtio_transport virtiofs ext4 dm-mod dm-crypt raid1 loop tun vhost_net vhost_vsock bridge
    kvm kvm-amd kvm-intel vfio vfio-pci vfio_iommu_type1 nvme e1000 e1000e igb igbvf 8139cp xhci-pci ahci
    snd-hda-intel uio_pci_generic i2c-i801 lpc_ich msr
)

make_stock() {
    local dir=$1 modules release
    mkdir "$dir/package"
    cd "$dir/package"
    logged stock-fetch apt_of_root download "$stock_package=$stock_version"
    dpkg-deb -x ./*.deb .
    modules=$(find . -type d -path '*lib/modules/*' -name "${stock_package#linux-image-}")
    release=${modules##*/}
    [ -n "$release" ] || die "$stock_package holds no modules"
    mv boot/vmlinuz-"$release" "$dir/bzImage"
    mv boot/config-"$release" "$dir/.config"
    mkdir -p "$dir/lib/modules/$release"
    mkdir -p lib "$dir/lib/modules/$release"
    cp "$modules"/modules.{builtin,builtin.modinfo,order} "$dir/lib/modules/$release/"
    [ -d lib/modules ] || ln -s "$PWD/${modules%/*}" lib/modules
    depmod -b . "$release"
    local each file
    for each in "${stock_modules[@]}"; do
        modprobe -d . -S "$release" --show-depends "$each" || die "the stock kernel has no module $each"
    done | awk '$1 == "insmod" { print $2 }' | sort -u | while read -r file; do
        each=$dir/lib/modules/$release/${file#*"/modules/$release/"}
        mkdir -p "${each%/*}"
        xz -dc "$file" >"${each%.xz}"
    done
    depmod -b "$dir" "$release"
    echo "$release" >"$dir/release"
    cd "$cache"
    rm -r "$dir/package"
}

stock=$cache/stock-$stock_version-$(key "$setup_dir/stock.sh")
