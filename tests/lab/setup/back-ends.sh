# Processes beside a VM that the root lacks: back ends of vhost-user devices, of which it has qemu-storage-daemon, a TPM, and
# a switch.
# Debian's own packages, taken out and never installed, so that the root stays as it is: what they stand on is in it, or
# beside them. Sourced, after root.sh.

# dpdk-testpmd is linked with drivers of NICs that it could have, each in a package of its own.
back_end_packages=(virtiofsd swtpm swtpm-libs libtpms0 passt dpdk-dev ibverbs-providers libjansson4
    librte-{bitratestats,bpf,bus-auxiliary,bus-dpaa,bus-pci,bus-vdev,cmdline,common-dpaax,common-iavf,cryptodev}25
    librte-{crypto-scheduler,dmadev,eal,ethdev,eventdev,gro,gso,hash,ip-frag,kvargs,latencystats,log,mbuf,mempool}25
    librte-{mempool-dpaa,mempool-ring,meter,metrics,net,net-bnxt,net-bond,net-dpaa,net-i40e,net-iavf,net-ice}25
    librte-{net-ixgbe,net-vhost,pcapng,pci,pdump,rcu,reorder,ring,sched,security,telemetry,timer,vhost}25
    librte-{common-mlx5,net-mlx5}-25)

# Open vSwitch. Its module, with those that it stands on, is kept apart from the hosts' modules, of which it is none: insmod
# takes them in the order of their names.
switch_packages=(openvswitch-switch openvswitch-common libunbound8 libevent-2.1-7t64 libxdp1)

make_switch_modules() {
    local dir=$1 each file number=0
    mkdir -p "$dir" kernel
    for each in image binary modules base; do
        apt_of_root download "linux-$each-$stock_release=$stock_version" || true
    done >"$cache/logs/switch.log" 2>&1
    for each in ./*.deb; do dpkg-deb -x "$each" kernel; done
    rm ./*.deb
    [ -d kernel/lib/modules ] || { mkdir -p kernel/lib && ln -s ../usr/lib/modules kernel/lib/modules; }
    depmod -b kernel "$stock_release"
    modprobe -d kernel -S "$stock_release" --show-depends openvswitch | awk '$1 == "insmod" { print $2 }' | while read -r file; do
        number=$((number + 1))
        each=${file##*/}
        xz -dc "$file" >"$dir/$(printf %02d $number)-${each%.xz}"
    done
    rm -r kernel
}

make_back_ends() {
    local dir=$1 each
    mkdir "$dir/tree"
    cd "$dir"
    logged back-ends apt_of_root download "${back_end_packages[@]}" "${switch_packages[@]}"
    for each in ./*.deb; do dpkg-deb -x "$each" tree; done
    rm ./*.deb
    make_switch_modules "$dir/tree/usr/local/lib/openvswitch"
    rm -rf tree/usr/share/{doc,man,locale,dpdk} tree/usr/include
    find tree/usr/bin -name 'dpdk-*' ! -name dpdk-testpmd -delete
    cd "$cache"
}

back_ends=$cache/back-ends-$(key "${root##*/}" "${stock##*/}" "$setup_dir/back-ends.sh")
