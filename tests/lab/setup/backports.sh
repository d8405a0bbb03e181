# The backports kernel: the newest linux-source of trixie-backports, tinyconfig and backports.config. As host it has what
# 6.12 lacks: dma-bufs of VFIO devices, mapped by iommufd (Linux 7.0). Debian's own kernel of that version would do but for
# CONFIG_IOMMUFD, which it leaves out. Sourced, after kernel.sh.

backports_source=$(apt-cache -o "Dir=$root" search --names-only '^linux-source-[7-9][.0-9]*$' | awk '{ print $1 }' | sort -V | tail -n 1)
[ -n "$backports_source" ] || die "$root_suite-backports has no linux-source of version 7 or later"
backports_version=$(apt-cache -o "Dir=$root" show --no-all-versions "$backports_source" | sed -n 's/^Version: //p')

make_backports() {
    local dir=$1
    build_kernel backports "$backports_source" "$backports_version" "$setup_dir/backports.config" 5 bzImage
    cp arch/x86/boot/bzImage .config "$dir/"
    cd "$cache"
    rm -rf "$cache/build-backports"
}

backports=$cache/backports-${backports_version/\~*}-$(key "$setup_dir/backports.config")
