# Debian's own kernels, taken out of their packages and never installed: the stable one is the kernel of guests and of
# most hosts, that of backports of hosts that share a device's memory by dma-buf. Sourced, after root.sh.
#
# Debian leaves out iommufd and VFIO's character devices. They are built as modules from the same version's source, so
# that no kernel has to be. A kernel's folder has two sets of modules: `lib/modules` is Debian's own, `iommufd/lib/modules`
# has the built ones in place of Debian's VFIO.

# What the emulated hosts and the guests load. Only these are kept, unpacked, with what they depend on.
kernel_modules=(
    9p 9pnet_virtio overlay crc32c_generic erofs virtio_pci virtio_blk virtio_net virtio_console virtio-rng virtio_balloon vsock
    vmw_vsock_virtio_transport virtiofs ext4 dm-mod dm-crypt raid1 loop tun vhost_net vhost_vsock bridge
    kvm kvm-amd kvm-intel vfio vfio-pci vfio_iommu_type1 nvme e1000 e1000e igb igbvf 8139cp xhci-pci ahci
    sd_mod usb-storage snd-hda-intel snd-hda-codec-generic snd-pcm-oss uio_pci_generic i2c-i801 lpc_ich evdev button efivarfs
    i6300esb pvpanic-pci virtio_pmem nd_pmem
)

# The root with a compiler and both kernels' headers, its files linked to those of the root. It goes when the set-up ends.
builder=$cache/builder

made_builder() {
    as_root rm -rf "$builder"
    trap 'as_root rm -rf "$builder"' EXIT
    made "$builder" "what modules are built with" make_builder
}

make_builder() {
    rmdir "$1"
    as_root cp -al "$root" "$1"
    logged builder in_root "$1" env INITRD=No apt-get install -y --no-install-recommends "${quickly[@]}" \
        make gcc "linux-headers-$stock_release" "linux-headers-$backports_release"
}

# build_vfio RELEASE VERSION: iommufd, VFIO and the samples of mediated devices as modules, left below $builder/vfio.
build_vfio() {
    local release=$1 version=$2 tree=$builder/vfio
    as_root rm -rf "$tree"
    as_root mkdir "$tree"
    logged "source-$release" apt_of_root download "linux-source-$(cut -d. -f1,2 <<<"$release")=$version"
    dpkg-deb --fsys-tarfile linux-source-*.deb | tar -xO --wildcards './usr/src/linux-source-*.tar.xz' |
        as_root tar -xJ -C "$tree" --strip-components=1 --no-same-owner \
            --wildcards '*/drivers/iommu' '*/drivers/vfio' '*/samples/vfio-mdev' '*/lib/interval_tree.c'
    rm linux-source-*.deb
    as_root cp "$setup_dir/build-vfio" "$tree/"
    logged "vfio-$release" in_root "$builder" sh /vfio/build-vfio "$release"
}

# make_kernel DIR RELEASE VERSION
make_kernel() {
    local dir=$1 release=$2 version=$3 each file modules
    mkdir "$dir/package"
    cd "$dir/package"
    # Where the image is in the package that is named after it differs from one version to the next.
    for each in image binary modules base; do
        apt_of_root download "linux-$each-$release=$version" || true
    done >"$cache/logs/kernel-$release.log" 2>&1
    [ -n "$(ls ./*.deb 2>/dev/null)" ] || die "Debian has no kernel $release; $cache/logs/kernel-$release.log has more"
    for each in ./*.deb; do dpkg-deb -x "$each" .; done
    rm ./*.deb
    modules=$(find . -type d -path '*lib/modules/*' -name "$release" | head -n 1)
    file=$(find . -name "vmlinuz-$release" -o -path "*/$release/vmlinuz")
    [ -n "$modules" ] && [ -n "$file" ] || die "the packages of $release hold no kernel, or no modules"
    mv "$file" "$dir/bzImage"
    [ -d lib/modules ] || { mkdir -p lib && ln -s "$PWD/${modules%/*}" lib/modules; }
    local kept=$dir/lib/modules/$release
    mkdir -p "$kept"
    cp "$modules"/modules.{builtin,builtin.modinfo,order} "$kept/"
    depmod -b . "$release"
    for each in "${kernel_modules[@]}"; do
        # Newer kernels have this one built in.
        modprobe -d . -S "$release" --show-depends "$each" || [ "$each" = crc32c_generic ] ||
            die "the kernel $release has no module $each"
    done | awk '$1 == "insmod" { print $2 }' | sort -u | while read -r file; do
        each=$kept/${file#*"/modules/$release/"}
        mkdir -p "${each%/*}"
        xz -dc "$file" >"${each%.xz}"
    done
    depmod -b "$dir" "$release"

    build_vfio "$release" "$version"
    mkdir "$dir/iommufd"
    cp -al "$dir/lib" "$dir/iommufd/"
    kept=$dir/iommufd/lib/modules/$release
    rm -r "$kept/kernel/drivers/vfio" "$kept"/modules.{dep,alias,symbols,softdep,devname}* "$kept/modules.builtin".*bin
    mkdir "$kept/updates"
    find "$builder/vfio" -name '*.ko' -exec cp {} "$kept/updates/" \;
    depmod -b "$dir/iommufd" "$release"
    echo "$release" >"$dir/release"
    cd "$cache"
    rm -r "$dir/package"
}

# unpack_kernel BZIMAGE: the ELF file in it. The Linux/x86 boot protocol has setup_sects at 0x1f1, payload_offset and
# payload_length at 0x248; the payload's last four bytes are its size when unpacked.
unpack_kernel() {
    local sectors offset length
    sectors=$(od -An -tu1 -j $((0x1f1)) -N 1 "$1")
    read -r offset length < <(od -An -tu4 -j $((0x248)) -N 8 "$1")
    dd if="$1" bs=1M iflag=skip_bytes,count_bytes skip=$(((sectors + 1) * 512 + offset)) count=$((length - 4)) status=none |
        zstd -dc
}

make_stock() {
    make_kernel "$1" "$stock_release" "$stock_version"
    unpack_kernel "$1/bzImage" >"$1/vmlinux"
}

make_backports() { make_kernel "$1" "$backports_release" "$backports_version"; }

kernel_key=$(key "$setup_dir/kernel.sh" "$setup_dir/build-vfio")
stock=$cache/stock-$stock_version-$kernel_key
backports=$cache/backports-${backports_version/\~*}-$kernel_key
