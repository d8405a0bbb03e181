# What guests boot by firmware from: OVMF, a boot loader, and the tools that make a partition and a FAT file system without
# root. Debian's own packages, taken out and never installed, so that the root stays as it is. Sourced, after kernel.sh.

firmware_packages=(ovmf grub-efi-amd64-signed mtools fdisk libfdisk1)
# Programs that such guests have, in an initramfs image of their own: /boot/guest-firmware.img in the host.
firmware_programs=(usr/bin/efibootmgr usr/sbin/dmidecode usr/sbin/sfdisk)

# older_firmware DIR: OVMF of the distribution before, by lists of its own.
older_firmware() {
    local mirror
    mirror=$(awk '$1 == "deb" { print $2; exit }' "$root/etc/apt/sources.list")
    logged firmware-debian-12 in_root "$builder" sh -ec '
        mkdir -p /older/lists/partial
        cd /older
        echo "deb $1 bookworm main" >sources.list
        older() { apt-get -o Dir::Etc::SourceList=/older/sources.list -o Dir::Etc::SourceParts=- -o Dir::State::Lists=/older/lists "$@"; }
        older update
        older download ovmf
        dpkg-deb -x ovmf_*.deb tree
    ' sh "$mirror"
    mkdir -p "$1"
    cp "$builder"/older/tree/usr/share/OVMF/OVMF_{CODE,VARS}_4M.fd "$1/"
}

make_firmware() {
    local dir=$1 each module
    mkdir "$dir/tree"
    cd "$dir"
    logged firmware apt_of_root download "${firmware_packages[@]}"
    for each in ./*.deb; do dpkg-deb -x "$each" tree; done
    rm ./*.deb
    rm -rf tree/usr/share/{doc,man,locale}
    older_firmware "$dir/tree/usr/share/OVMF-debian-12"
    # A module of the host's, without which firmware in a guest ends the emulator.
    module=$builder/lab-cr8
    as_root mkdir "$module"
    as_root cp "$setup_dir/lab-cr8.c" "$module/"
    echo 'obj-m += lab-cr8.o' | as_root tee "$module/Kbuild" >/dev/null
    logged lab-cr8 in_root "$builder" make -C "/usr/src/linux-headers-$stock_release" M=/lab-cr8 modules
    install -D -m 644 "$module/lab-cr8.ko" tree/usr/local/lib/lab-cr8.ko
    logged firmware-programs in_root "$builder" apt-get install -y --no-install-recommends "${quickly[@]}" \
        efibootmgr dmidecode fdisk
    mkdir tree/boot
    pack_programs "$builder" "$dir/tree/boot/guest-firmware.img" "${firmware_programs[@]}"
    cd "$cache"
}

firmware=$cache/firmware-$stock_version-$(key "${root##*/}" "$setup_dir"/{firmware.sh,images.sh,lab-cr8.c})
