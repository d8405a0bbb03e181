# The emulated host's disk, which is only read: the root, and in /boot the kernels' modules and what guests boot from.
# Sourced, after images.sh, firmware.sh and back-ends.sh.

make_disk() {
    local dir=$1 tree=$1/tree each
    as_root cp -al "$root" "$tree"
    for each in stock:"$stock/lib" iommufd:"$stock/iommufd/lib" ${backports:+backports:"$backports/iommufd/lib"}; do
        as_root mkdir -p "$tree/boot/${each%%:*}"
        as_root cp -al "${each#*:}/modules" "$tree/boot/${each%%:*}/"
    done
    as_root cp -al "$stock"/{bzImage,vmlinux} "$images"/guest*.img "$tree/boot/"
    # A file that the root has is replaced and never written to, for it is linked to the root's.
    as_root cp -a --remove-destination --no-preserve=ownership "$firmware/tree/." "$tree/"
    as_root cp -a --remove-destination --no-preserve=ownership "$back_ends/tree/." "$tree/"
    as_root install -m 755 "$setup_dir/host-agent" "$tree/usr/local/sbin/lab-agent"
    as_root install -D -m 644 "$setup_dir/lab-agent.service" "$tree/etc/systemd/system/lab-agent.service"
    as_root mkdir -p "$tree"/{lab,project,cache,usr/lib/modules}
    # The root's own program, by the root's own loader.
    logged disk as_root "$root/usr/lib64/ld-linux-x86-64.so.2" --library-path "$root/usr/lib/x86_64-linux-gnu" \
        "$root/usr/bin/mkfs.erofs" --exclude-regex='^(var/lib/apt/lists|var/cache|usr/share/(doc|man|locale))/' \
        "$dir/root.erofs" "$tree"
    as_root rm -rf "$tree"
}

disk=$cache/disk-$(key "${root##*/}" "${stock##*/}" "${backports##*/}" "${images##*/}" "${firmware##*/}" "${back_ends##*/}" "$setup_dir"/{disk.sh,host-agent,lab-agent.service})
