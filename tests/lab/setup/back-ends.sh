# Processes beside a VM that the root lacks: back ends of vhost-user devices, of which it has qemu-storage-daemon, and a TPM. Debian's own packages, taken out and
# never installed, so that the root stays as it is: what they stand on is in it. Sourced, after root.sh.

back_end_packages=(virtiofsd swtpm swtpm-libs libtpms0)

make_back_ends() {
    local dir=$1 each
    mkdir "$dir/tree"
    cd "$dir"
    logged back-ends apt_of_root download "${back_end_packages[@]}"
    for each in ./*.deb; do dpkg-deb -x "$each" tree; done
    rm ./*.deb
    rm -rf tree/usr/share/{doc,man,locale}
    cd "$cache"
}

back_ends=$cache/back-ends-$(key "${root##*/}" "$setup_dir/back-ends.sh")
