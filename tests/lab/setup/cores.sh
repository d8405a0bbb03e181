# A host's kernel that has core scheduling, which none of Debian's has: the stock kernel's source with what a host needs built
# in, and no module. Sourced, after kernel.sh.

# make_cores DIR: DIR/bzImage.
make_cores() {
    local dir=$1
    logged cores-tools in_root "$builder" apt-get install -y --no-install-recommends "${quickly[@]}" flex bison bc libelf-dev
    cd "$dir"
    logged cores-source apt_of_root download "linux-source-$(cut -d. -f1,2 <<<"$stock_release")=$stock_version"
    as_root rm -rf "$builder/cores"
    as_root mkdir "$builder/cores"
    dpkg-deb --fsys-tarfile linux-source-*.deb | tar -xO --wildcards './usr/src/linux-source-*.tar.xz' |
        as_root tar -xJ -C "$builder/cores" --strip-components=1 --no-same-owner
    rm linux-source-*.deb
    as_root cp "$setup_dir/cores.config" "$builder/cores/"
    logged cores in_root "$builder" sh -ec '
        cd /cores
        make x86_64_defconfig
        cat cores.config >>.config
        make olddefconfig
        grep -qx CONFIG_SCHED_CORE=y .config
        make -j"$(nproc)" bzImage'
    cp "$builder/cores/arch/x86/boot/bzImage" "$dir/"
    as_root rm -rf "$builder/cores"
    cd "$cache"
}

cores=$cache/cores-$stock_version-$(key "${root##*/}" "$setup_dir"/{cores.sh,cores.config})
