# A disk with a whole Debian on it, as an installer leaves it: an EFI system partition with the signed shim and GRUB, and an
# ext4 root with the stock kernel and systemd, which ends at a login on the serial console. Sourced, after images.sh.

system_packages=(systemd-sysv udev kmod dbus)
system_boot_packages=(shim-signed grub-efi-amd64-signed)

# make_system DIR: DIR/system.qcow2, which is not to be written to.
make_system() {
    local dir=$1 tree=$1/tree mirror each
    mirror=$(awk '$1 == "deb" { print $2; exit }' "$root/etc/apt/sources.list")
    logged system as_root debootstrap --variant=minbase --include="$(IFS=, && echo "${system_packages[*]}")" \
        "$root_suite" "$tree" "$mirror"
    as_root rm -rf "$tree"/var/{cache/apt,lib/apt/lists} "$tree"/usr/share/{doc,man,locale}
    as_root cp -r "$setup_dir/system/." "$tree/"
    as_root mkdir -p "$tree/usr/lib/modules" "$tree/boot/grub"
    as_root cp -r "$stock/lib/modules/." "$tree/usr/lib/modules/"
    as_root cp "$stock/bzImage" "$tree/boot/vmlinuz"
    as_root mv "$tree/grub.cfg" "$tree/boot/grub/"

    mkdir -p "$dir/initrd/bin"
    cp "$root/usr/bin/busybox" "$dir/initrd/bin/"
    install -m 755 "$setup_dir/system-init" "$dir/initrd/init"
    with_modules "$dir/initrd" "$stock" virtio_pci virtio_blk nvme ext4 crc32c_generic
    pack "$dir/initrd" "$dir/initrd.img"
    as_root mv "$dir/initrd.img" "$tree/boot/initrd"

    mkdir "$dir/boot"
    cd "$dir/boot"
    logged system-boot apt_of_root download "${system_boot_packages[@]}"
    for each in ./*.deb; do dpkg-deb -x "$each" .; done
    as_root rm -rf "$builder/system"
    as_root mkdir "$builder/system"
    as_root cp usr/lib/shim/shimx64.efi.signed usr/lib/grub/x86_64-efi-signed/grubx64.efi.signed "$setup_dir/pack-system" \
        "$builder/system/"
    cd "$cache"
    logged system-tools in_root "$builder" apt-get install -y --no-install-recommends "${quickly[@]}" mtools fdisk
    as_root mv "$tree" "$builder/system/tree"
    logged system-pack in_root "$builder" sh /system/pack-system
    cp "$builder/system/system.qcow2" "$dir/"
    as_root rm -rf "$builder/system" "$dir/boot"
}

system=$cache/system-$(key "${root##*/}" "${stock##*/}" "$setup_dir"/{system.sh,system-init,pack-system,system/grub.cfg,system/etc/fstab,system/etc/hostname,system/etc/systemd/system/lab-report.service})
