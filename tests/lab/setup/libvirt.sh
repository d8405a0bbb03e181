# libvirt with its `ch` driver, which Debian's packages leave out: from the source of Debian's own package, built in what
# modules are built with. Sourced, after kernel.sh.

libvirt_version=11.3.0
libvirt_sum=6bcb0c42c4580436fea262ced56f68a6afe20f7390b1bea2116718cc034a0283
libvirt_needs=(
    meson ninja-build gcc pkg-config libxml2-dev libglib2.0-dev libgnutls28-dev libtirpc-dev libjson-c-dev libcurl4-openssl-dev
    libnl-3-dev libnl-route-3-dev libudev-dev libpciaccess-dev libreadline-dev libacl1-dev libcap-ng-dev libdevmapper-dev
    python3-docutils xsltproc libxml2-utils gettext
)
# docs/libvirt.md has the same words; a trial compares them.
libvirt_options=(
    -Dauto_features=disabled -Dsystem=true -Ddriver_libvirtd=enabled -Ddriver_remote=enabled -Ddriver_ch=enabled
    -Djson_c=enabled -Dcurl=enabled -Dlibnl=enabled -Dudev=enabled -Dpciaccess=enabled -Dreadline=enabled
    -Dhost_validate=enabled -Ddocs=disabled -Dtests=disabled
)

# make_libvirt DIR: an archive of what a host needs beside the root to run libvirtd, virtlogd and virsh.
make_libvirt() {
    local dir=$1 mirror
    mirror=$(awk '$1 == "deb" { print $2; exit }' "$root/etc/apt/sources.list")
    as_root rm -rf "$builder/libvirt"
    as_root mkdir "$builder/libvirt"
    # It checks the sum.
    logged libvirt-source in_root "$builder" /usr/lib/apt/apt-helper download-file \
        "$mirror/pool/main/libv/libvirt/libvirt_$libvirt_version.orig.tar.xz" /libvirt/source.tar.xz "SHA256:$libvirt_sum"
    as_root tar -xJ -C "$builder/libvirt" --strip-components=1 --no-same-owner -f "$builder/libvirt/source.tar.xz"
    logged libvirt-tools in_root "$builder" apt-get install -y --no-install-recommends "${quickly[@]}" "${libvirt_needs[@]}"
    logged libvirt-configure in_root "$builder" meson setup /libvirt/build /libvirt "${libvirt_options[@]}"
    logged libvirt-build in_root "$builder" ninja -C /libvirt/build
    logged libvirt-install in_root "$builder" env DESTDIR=/libvirt/tree meson install -C /libvirt/build --no-rebuild --strip
    as_root cp "$setup_dir/pack-libvirt" "$builder/libvirt/"
    logged libvirt-pack in_root "$builder" sh /libvirt/pack-libvirt
    # What the root has already is left out.
    while read -r file; do [ -e "$root/$file" ] || printf '%s\n' "$file"; done <"$builder/libvirt/libraries" |
        as_root tar -r -C "$builder" -f "$builder/libvirt/libvirt.tar" -h -T -
    cp "$builder/libvirt/libvirt.tar" "$dir/"
}

libvirt=$cache/libvirt-$libvirt_version-$(key "${root##*/}" "$setup_dir"/{libvirt.sh,pack-libvirt})
