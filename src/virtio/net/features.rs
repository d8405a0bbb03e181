//! Which features stand on which, and what of them a tap is told.

use crate::virtio::spec::net;

/// The features that say what the driver takes unfinished.
pub(super) const GUEST_OFFLOADS: u64 = net::F_GUEST_CSUM
    | net::F_GUEST_TSO4
    | net::F_GUEST_TSO6
    | net::F_GUEST_ECN
    | net::F_GUEST_USO4
    | net::F_GUEST_USO6;

/// The features of UDP that is cut into segments by who has it next: of both directions.
pub(super) const USO: u64 = net::F_HOST_USO | GUEST_USO;

/// Those of what the driver takes.
pub(super) const GUEST_USO: u64 = net::F_GUEST_USO4 | net::F_GUEST_USO6;

/// `TUN_F_*` for the features of what the driver takes unfinished. UDP's segments are asked for over both versions of IP
/// or over none, for a tap has no half of that. Linux, drivers/net/tun.c, `set_offload`
pub(super) fn offload(features: u64) -> libc::c_uint {
    let all = [
        (net::F_GUEST_CSUM, libc::TUN_F_CSUM),
        (net::F_GUEST_TSO4, libc::TUN_F_TSO4),
        (net::F_GUEST_TSO6, libc::TUN_F_TSO6),
        (net::F_GUEST_ECN, libc::TUN_F_TSO_ECN),
        (GUEST_USO, libc::TUN_F_USO4 | libc::TUN_F_USO6),
    ];
    all.into_iter()
        .filter(|(wanted, _)| features & wanted == *wanted)
        .fold(0, |flags, (_, flag)| flags | flag)
}

/// Features, each with those of which it needs one. Virtio 1.3 §5.1.3.1.
const STAND_ON: [(u64, u64); 5] = [
    (
        net::F_GUEST_TSO4 | net::F_GUEST_TSO6 | GUEST_USO,
        net::F_GUEST_CSUM,
    ),
    (net::F_GUEST_ECN, net::F_GUEST_TSO4 | net::F_GUEST_TSO6),
    (
        net::F_HOST_TSO4 | net::F_HOST_TSO6 | net::F_HOST_USO,
        net::F_CSUM,
    ),
    (net::F_HOST_ECN, net::F_HOST_TSO4 | net::F_HOST_TSO6),
    (net::F_MQ | net::F_CTRL_GUEST_OFFLOADS, net::F_CTRL_VQ),
];

/// Whether each of these features has one of those that it stands on.
pub(in crate::virtio) fn have_what_they_stand_on(features: u64) -> bool {
    founded(features) == features
}

/// Of `features`, those that have one of those that they stand on.
pub(in crate::virtio) fn founded(features: u64) -> u64 {
    // What others stand on comes before them.
    STAND_ON
        .into_iter()
        .fold(features, |features, (upper, lower)| {
            match features & lower {
                0 => features & !upper,
                _ => features,
            }
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tap_is_asked_for_segments_of_udp_over_both_versions_of_ip_or_none() {
        let csum = net::F_GUEST_CSUM;
        let both = libc::TUN_F_CSUM | libc::TUN_F_USO4 | libc::TUN_F_USO6;
        assert_eq!(offload(csum | GUEST_USO), both);
        for one in [net::F_GUEST_USO4, net::F_GUEST_USO6] {
            assert_eq!(offload(csum | one), libc::TUN_F_CSUM);
        }
        let tso = net::F_GUEST_TSO4 | net::F_GUEST_ECN;
        let flags = libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO_ECN;
        assert_eq!(offload(csum | tso), flags);
    }

    #[test]
    fn segments_of_udp_stand_on_checksums() {
        for (uso, csum) in [
            (net::F_HOST_USO, net::F_CSUM),
            (net::F_GUEST_USO4, net::F_GUEST_CSUM),
            (net::F_GUEST_USO6, net::F_GUEST_CSUM),
        ] {
            assert!(!have_what_they_stand_on(uso));
            assert!(have_what_they_stand_on(uso | csum));
            assert_eq!(founded(uso), 0);
        }
    }
}
