# The small kernel: Debian's linux-source, tinyconfig and small.config. As host it has iommufd; as guest it comes both
# as bzImage and as ELF for the PVH entry. Sourced, after root.sh.

small_source=linux-source-6.12

make_small() {
    local dir=$1 tree=$cache/build-small
    rm -rf "$tree"
    mkdir -p "$tree/package" "$tree/linux"
    cd "$tree/package"
    logged small-fetch apt_of_root download "$small_source=$small_version"
    dpkg-deb --fsys-tarfile ./*.deb | tar -xO --wildcards './usr/src/linux-source-*.tar.xz' |
        tar -xJ -C ../linux --strip-components=1
    cd ../linux
    logged small-config make ARCH=x86_64 tinyconfig
    cat "$setup_dir/small.config" >>.config
    logged small-config make ARCH=x86_64 olddefconfig
    local missing
    missing=$(grep '^CONFIG_.*=[^n]' "$setup_dir/small.config" | grep -vxFf .config || true)
    [ -z "$missing" ] || die "the small kernel's configuration does not keep: $missing"
    say "building the small kernel takes about ten minutes on two cores, this once"
    logged small-build nice make ARCH=x86_64 -j"$(nproc)" bzImage vmlinux
    cp arch/x86/boot/bzImage .config "$dir/"
    objcopy --strip-all vmlinux "$dir/vmlinux"
    cd "$cache"
    rm -rf "$tree"
}

small=$cache/small-$small_version-$(key "$setup_dir/small.config")
