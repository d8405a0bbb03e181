# Processes beside a VM that the root lacks: back ends of vhost-user devices, of which it has qemu-storage-daemon, and a TPM.
# Debian's own packages, taken out and never installed, so that the root stays as it is: what they stand on is in it, or
# beside them. Sourced, after root.sh.

# dpdk-testpmd is linked with drivers of NICs that it could have, each in a package of its own.
back_end_packages=(virtiofsd swtpm swtpm-libs libtpms0 passt dpdk-dev ibverbs-providers libjansson4
    librte-{bitratestats,bpf,bus-auxiliary,bus-dpaa,bus-pci,bus-vdev,cmdline,common-dpaax,common-iavf,cryptodev}25
    librte-{crypto-scheduler,dmadev,eal,ethdev,eventdev,gro,gso,hash,ip-frag,kvargs,latencystats,log,mbuf,mempool}25
    librte-{mempool-dpaa,mempool-ring,meter,metrics,net,net-bnxt,net-bond,net-dpaa,net-i40e,net-iavf,net-ice}25
    librte-{net-ixgbe,net-vhost,pcapng,pci,pdump,rcu,reorder,ring,sched,security,telemetry,timer,vhost}25
    librte-{common-mlx5,net-mlx5}-25)

make_back_ends() {
    local dir=$1 each
    mkdir "$dir/tree"
    cd "$dir"
    logged back-ends apt_of_root download "${back_end_packages[@]}"
    for each in ./*.deb; do dpkg-deb -x "$each" tree; done
    rm ./*.deb
    rm -rf tree/usr/share/{doc,man,locale,dpdk} tree/usr/include
    find tree/usr/bin -name 'dpdk-*' ! -name dpdk-testpmd -delete
    cd "$cache"
}

back_ends=$cache/back-ends-$(key "${root##*/}" "$setup_dir/back-ends.sh")
