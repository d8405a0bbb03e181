# The small kernel: Debian's linux-source, tinyconfig and small.config. As host it has iommufd; as guest it comes both
# as bzImage and as ELF for the PVH entry. Sourced, after kernel.sh.

small_source=linux-source-6.12

make_small() {
    local dir=$1
    build_kernel small "$small_source" "$small_version" "$setup_dir/small.config" 10 bzImage vmlinux
    cp arch/x86/boot/bzImage .config "$dir/"
    objcopy --strip-all vmlinux "$dir/vmlinux"
    cd "$cache"
    rm -rf "$cache/build-small"
}

small=$cache/small-$small_version-$(key "$setup_dir/small.config")
