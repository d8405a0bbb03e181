//! Constants of virtio 1.3, by `virtio-bindings`, which has them from Linux, in the types that they have
//! on the bus. What it lacks stands here with its section: virtio over PCI, and the console.

use virtio_bindings::{virtio_config, virtio_ids, virtio_ring};

/// Device types. Virtio 1.3 §5.
pub mod device_type {
    use super::virtio_ids;

    /// Network card. §5.1
    pub const NET: u16 = virtio_ids::VIRTIO_ID_NET as u16;
    /// Block device. §5.2
    pub const BLOCK: u16 = virtio_ids::VIRTIO_ID_BLOCK as u16;
    /// Console. §5.3
    pub const CONSOLE: u16 = virtio_ids::VIRTIO_ID_CONSOLE as u16;
    /// Memory balloon. §5.5
    pub const BALLOON: u16 = virtio_ids::VIRTIO_ID_BALLOON as u16;
    /// Shared folder. §5.11
    pub const FS: u16 = virtio_ids::VIRTIO_ID_FS as u16;
    /// Entropy source. §5.4
    pub const ENTROPY: u16 = virtio_ids::VIRTIO_ID_RNG as u16;
    /// Memory device. §5.15
    pub const MEM: u16 = virtio_ids::VIRTIO_ID_MEM as u16;
    /// Socket device. §5.10
    pub const VSOCK: u16 = virtio_ids::VIRTIO_ID_VSOCK as u16;
    /// Persistent memory. §5.19
    pub const PMEM: u16 = virtio_ids::VIRTIO_ID_PMEM as u16;
}

/// Device status bits. Virtio 1.3 §2.1.
pub mod status {
    use super::virtio_config;

    /// The guest has noticed the device.
    pub const ACKNOWLEDGE: u8 = virtio_config::VIRTIO_CONFIG_S_ACKNOWLEDGE as u8;
    /// The guest knows how to drive it.
    pub const DRIVER: u8 = virtio_config::VIRTIO_CONFIG_S_DRIVER as u8;
    /// The driver is ready.
    pub const DRIVER_OK: u8 = virtio_config::VIRTIO_CONFIG_S_DRIVER_OK as u8;
    /// Feature negotiation is complete.
    pub const FEATURES_OK: u8 = virtio_config::VIRTIO_CONFIG_S_FEATURES_OK as u8;
    /// The device has met an error that it cannot recover from.
    pub const DEVICE_NEEDS_RESET: u8 = virtio_config::VIRTIO_CONFIG_S_NEEDS_RESET as u8;
    /// The driver has given up.
    pub const FAILED: u8 = virtio_config::VIRTIO_CONFIG_S_FAILED as u8;
}

/// Feature bits that do not belong to one type of device. Virtio 1.3 §6.
pub mod feature {
    use super::{virtio_config, virtio_ring};

    /// `VIRTIO_F_INDIRECT_DESC`
    pub const INDIRECT_DESC: u64 = 1 << virtio_ring::VIRTIO_RING_F_INDIRECT_DESC;
    /// `VIRTIO_F_EVENT_IDX`
    pub const EVENT_IDX: u64 = 1 << virtio_ring::VIRTIO_RING_F_EVENT_IDX;
    /// `VIRTIO_F_VERSION_1`
    pub const VERSION_1: u64 = 1 << virtio_config::VIRTIO_F_VERSION_1;
}

/// A vector register that holds this has no vector. Virtio 1.3 §4.1.5.1.2.
pub const NO_VECTOR: u16 = 0xffff;

/// `VIRTQ_AVAIL_F_NO_INTERRUPT`. Virtio 1.3 §2.7.6.
pub const AVAIL_F_NO_INTERRUPT: u16 = virtio_ring::VRING_AVAIL_F_NO_INTERRUPT as u16;

/// `VIRTQ_DESC_F_NEXT`. Virtio 1.3 §2.7.5.
pub const DESC_F_NEXT: u16 = virtio_ring::VRING_DESC_F_NEXT as u16;
/// `VIRTQ_DESC_F_WRITE`
pub const DESC_F_WRITE: u16 = virtio_ring::VRING_DESC_F_WRITE as u16;
/// `VIRTQ_DESC_F_INDIRECT`
pub const DESC_F_INDIRECT: u16 = virtio_ring::VRING_DESC_F_INDIRECT as u16;

/// ISR status bits. Virtio 1.3 §4.1.4.5.
pub mod isr {
    /// A queue has used buffers.
    pub const QUEUE: u8 = 1;
    /// The device configuration, or the status, has changed.
    pub const CONFIG: u8 = 2;
    /// All that there are.
    pub const ALL: u8 = QUEUE | CONFIG;
}

/// Virtio over PCI. Virtio 1.3 §4.1.
pub mod pci {
    /// Vendor of every virtio device. §4.1.2
    pub const VENDOR: u16 = 0x1af4;
    /// Device id of type 0; a modern device's is this and its type. §4.1.2
    pub const MODERN_DEVICE_BASE: u16 = 0x1040;
    /// A modern device's subsystem id is this or above. §4.1.2.1
    pub const SUBSYSTEM_BASE: u16 = 0x40;

    /// `VIRTIO_PCI_CAP_COMMON_CFG`. §4.1.4
    pub const CAP_COMMON_CFG: u8 = 1;
    /// `VIRTIO_PCI_CAP_NOTIFY_CFG`
    pub const CAP_NOTIFY_CFG: u8 = 2;
    /// `VIRTIO_PCI_CAP_ISR_CFG`
    pub const CAP_ISR_CFG: u8 = 3;
    /// `VIRTIO_PCI_CAP_DEVICE_CFG`
    pub const CAP_DEVICE_CFG: u8 = 4;
    /// `VIRTIO_PCI_CAP_PCI_CFG`
    pub const CAP_PCI_CFG: u8 = 5;

    /// Offsets in `struct virtio_pci_common_cfg`. §4.1.4.3
    pub mod common {
        /// `device_feature_select`, 32 bits
        pub const DEVICE_FEATURE_SELECT: u64 = 0;
        /// `device_feature`, 32 bits, read-only
        pub const DEVICE_FEATURE: u64 = 4;
        /// `driver_feature_select`, 32 bits
        pub const DRIVER_FEATURE_SELECT: u64 = 8;
        /// `driver_feature`, 32 bits
        pub const DRIVER_FEATURE: u64 = 12;
        /// `config_msix_vector`, 16 bits
        pub const CONFIG_MSIX_VECTOR: u64 = 16;
        /// `num_queues`, 16 bits, read-only
        pub const NUM_QUEUES: u64 = 18;
        /// `device_status`, 8 bits
        pub const DEVICE_STATUS: u64 = 20;
        /// `config_generation`, 8 bits, read-only
        pub const CONFIG_GENERATION: u64 = 21;
        /// `queue_select`, 16 bits
        pub const QUEUE_SELECT: u64 = 22;
        /// `queue_size`, 16 bits
        pub const QUEUE_SIZE: u64 = 24;
        /// `queue_msix_vector`, 16 bits
        pub const QUEUE_MSIX_VECTOR: u64 = 26;
        /// `queue_enable`, 16 bits
        pub const QUEUE_ENABLE: u64 = 28;
        /// `queue_notify_off`, 16 bits, read-only
        pub const QUEUE_NOTIFY_OFF: u64 = 30;
        /// `queue_desc`, 64 bits, also accessed by halves
        pub const QUEUE_DESC: u64 = 32;
        /// `queue_driver`, 64 bits, also accessed by halves
        pub const QUEUE_DRIVER: u64 = 40;
        /// `queue_device`, 64 bits, also accessed by halves
        pub const QUEUE_DEVICE: u64 = 48;
        /// Bytes, without the fields that need a feature we do not offer.
        pub const SIZE: u64 = 56;
    }
}

/// Block device. Virtio 1.3 §5.2.
pub mod blk {
    use std::mem::offset_of;

    use virtio_bindings::virtio_blk::*;

    /// `VIRTIO_BLK_F_SEG_MAX`. §5.2.3
    pub const F_SEG_MAX: u64 = 1 << VIRTIO_BLK_F_SEG_MAX;
    /// `VIRTIO_BLK_F_SIZE_MAX`
    pub const F_SIZE_MAX: u64 = 1 << VIRTIO_BLK_F_SIZE_MAX;
    /// `VIRTIO_BLK_F_GEOMETRY`
    pub const F_GEOMETRY: u64 = 1 << VIRTIO_BLK_F_GEOMETRY;
    /// `VIRTIO_BLK_F_RO`
    pub const F_RO: u64 = 1 << VIRTIO_BLK_F_RO;
    /// `VIRTIO_BLK_F_BLK_SIZE`
    pub const F_BLK_SIZE: u64 = 1 << VIRTIO_BLK_F_BLK_SIZE;
    /// `VIRTIO_BLK_F_FLUSH`
    pub const F_FLUSH: u64 = 1 << VIRTIO_BLK_F_FLUSH;
    /// `VIRTIO_BLK_F_CONFIG_WCE`
    pub const F_CONFIG_WCE: u64 = 1 << VIRTIO_BLK_F_CONFIG_WCE;
    /// `VIRTIO_BLK_F_TOPOLOGY`
    pub const F_TOPOLOGY: u64 = 1 << VIRTIO_BLK_F_TOPOLOGY;
    /// `VIRTIO_BLK_F_MQ`
    pub const F_MQ: u64 = 1 << VIRTIO_BLK_F_MQ;
    /// `VIRTIO_BLK_F_DISCARD`
    pub const F_DISCARD: u64 = 1 << VIRTIO_BLK_F_DISCARD;
    /// `VIRTIO_BLK_F_WRITE_ZEROES`
    pub const F_WRITE_ZEROES: u64 = 1 << VIRTIO_BLK_F_WRITE_ZEROES;

    /// `VIRTIO_BLK_T_IN`. §5.2.6
    pub const T_IN: u32 = VIRTIO_BLK_T_IN;
    /// `VIRTIO_BLK_T_OUT`
    pub const T_OUT: u32 = VIRTIO_BLK_T_OUT;
    /// `VIRTIO_BLK_T_FLUSH`
    pub const T_FLUSH: u32 = VIRTIO_BLK_T_FLUSH;
    /// `VIRTIO_BLK_T_GET_ID`
    pub const T_GET_ID: u32 = VIRTIO_BLK_T_GET_ID;
    /// `VIRTIO_BLK_T_DISCARD`
    pub const T_DISCARD: u32 = VIRTIO_BLK_T_DISCARD;
    /// `VIRTIO_BLK_T_WRITE_ZEROES`
    pub const T_WRITE_ZEROES: u32 = VIRTIO_BLK_T_WRITE_ZEROES;

    /// `VIRTIO_BLK_S_OK`. §5.2.6
    pub const S_OK: u8 = VIRTIO_BLK_S_OK as u8;
    /// `VIRTIO_BLK_S_IOERR`
    pub const S_IOERR: u8 = VIRTIO_BLK_S_IOERR as u8;
    /// `VIRTIO_BLK_S_UNSUPP`
    pub const S_UNSUPP: u8 = VIRTIO_BLK_S_UNSUPP as u8;

    /// Offset of `capacity` in `struct virtio_blk_config`, 64 bits. §5.2.4
    pub const CONFIG_CAPACITY: usize = offset_of!(virtio_blk_config, capacity);
    /// Offset of `wce` in it, which the driver writes: 1 while writes may stay in a cache. §5.2.4
    pub const CONFIG_WRITEBACK: usize = offset_of!(virtio_blk_config, wce);
    /// Bytes of a sector, the unit of every position and length, whatever the block size.
    pub const SECTOR: u64 = 512;
    /// Bytes of the string that `VIRTIO_BLK_T_GET_ID` asks for.
    pub const ID_SIZE: usize = VIRTIO_BLK_ID_BYTES as usize;
    /// The flag of `struct virtio_blk_discard_write_zeroes` that says that write zeroes may deallocate.
    pub const RANGE_F_UNMAP: u32 = VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP;
}

/// Network card. Virtio 1.3 §5.1.
pub mod net {
    use std::mem::offset_of;

    use virtio_bindings::virtio_net::*;

    /// `VIRTIO_NET_F_CSUM`: the device takes packets with a partial checksum. §5.1.3
    pub const F_CSUM: u64 = 1 << VIRTIO_NET_F_CSUM;
    /// `VIRTIO_NET_F_GUEST_CSUM`: the driver takes them.
    pub const F_GUEST_CSUM: u64 = 1 << VIRTIO_NET_F_GUEST_CSUM;
    /// `VIRTIO_NET_F_CTRL_GUEST_OFFLOADS`
    pub const F_CTRL_GUEST_OFFLOADS: u64 = 1 << VIRTIO_NET_F_CTRL_GUEST_OFFLOADS;
    /// `VIRTIO_NET_F_MTU`: the configuration has the longest packet that the driver may send.
    pub const F_MTU: u64 = 1 << VIRTIO_NET_F_MTU;
    /// `VIRTIO_NET_F_MAC`
    pub const F_MAC: u64 = 1 << VIRTIO_NET_F_MAC;
    /// `VIRTIO_NET_F_GUEST_TSO4`
    pub const F_GUEST_TSO4: u64 = 1 << VIRTIO_NET_F_GUEST_TSO4;
    /// `VIRTIO_NET_F_GUEST_TSO6`
    pub const F_GUEST_TSO6: u64 = 1 << VIRTIO_NET_F_GUEST_TSO6;
    /// `VIRTIO_NET_F_GUEST_ECN`
    pub const F_GUEST_ECN: u64 = 1 << VIRTIO_NET_F_GUEST_ECN;
    /// `VIRTIO_NET_F_HOST_TSO4`
    pub const F_HOST_TSO4: u64 = 1 << VIRTIO_NET_F_HOST_TSO4;
    /// `VIRTIO_NET_F_HOST_TSO6`
    pub const F_HOST_TSO6: u64 = 1 << VIRTIO_NET_F_HOST_TSO6;
    /// `VIRTIO_NET_F_HOST_ECN`
    pub const F_HOST_ECN: u64 = 1 << VIRTIO_NET_F_HOST_ECN;
    /// `VIRTIO_NET_F_MRG_RXBUF`
    pub const F_MRG_RXBUF: u64 = 1 << VIRTIO_NET_F_MRG_RXBUF;
    /// `VIRTIO_NET_F_STATUS`
    pub const F_STATUS: u64 = 1 << VIRTIO_NET_F_STATUS;
    /// `VIRTIO_NET_F_CTRL_VQ`
    pub const F_CTRL_VQ: u64 = 1 << VIRTIO_NET_F_CTRL_VQ;
    /// `VIRTIO_NET_F_MQ`
    pub const F_MQ: u64 = 1 << VIRTIO_NET_F_MQ;

    /// `VIRTIO_NET_F_GUEST_USO4`: the driver takes UDP over IPv4 that is to be cut into segments.
    pub const F_GUEST_USO4: u64 = 1 << VIRTIO_NET_F_GUEST_USO4;
    /// `VIRTIO_NET_F_GUEST_USO6`
    pub const F_GUEST_USO6: u64 = 1 << VIRTIO_NET_F_GUEST_USO6;
    /// `VIRTIO_NET_F_HOST_USO`: the device takes it, over IPv4 and IPv6.
    pub const F_HOST_USO: u64 = 1 << VIRTIO_NET_F_HOST_USO;

    /// Offset of `status` in `struct virtio_net_config`, 16 bits. §5.1.4
    pub const CONFIG_STATUS: usize = offset_of!(virtio_net_config, status);
    /// `VIRTIO_NET_S_LINK_UP`
    pub const S_LINK_UP: u16 = VIRTIO_NET_S_LINK_UP as u16;

    /// Bytes of `struct virtio_net_hdr` with `num_buffers`. §5.1.6
    pub const HEADER_SIZE: usize = size_of::<virtio_net_hdr_mrg_rxbuf>();
    /// Offset of its `num_buffers`.
    pub const HEADER_NUM_BUFFERS: usize = offset_of!(virtio_net_hdr_mrg_rxbuf, num_buffers);

    /// `VIRTIO_NET_HDR_F_NEEDS_CSUM`. §5.1.6
    pub const HDR_F_NEEDS_CSUM: u8 = VIRTIO_NET_HDR_F_NEEDS_CSUM as u8;
    /// `VIRTIO_NET_HDR_GSO_NONE`
    pub const GSO_NONE: u8 = VIRTIO_NET_HDR_GSO_NONE as u8;
    /// `VIRTIO_NET_HDR_GSO_TCPV4`
    pub const GSO_TCPV4: u8 = VIRTIO_NET_HDR_GSO_TCPV4 as u8;
    /// `VIRTIO_NET_HDR_GSO_TCPV6`
    pub const GSO_TCPV6: u8 = VIRTIO_NET_HDR_GSO_TCPV6 as u8;
    /// `VIRTIO_NET_HDR_GSO_UDP_L4`
    pub const GSO_UDP_L4: u8 = VIRTIO_NET_HDR_GSO_UDP_L4 as u8;
    /// `VIRTIO_NET_HDR_GSO_ECN`, beside one of TCP's.
    pub const GSO_ECN: u8 = VIRTIO_NET_HDR_GSO_ECN as u8;

    /// `VIRTIO_NET_OK`. §5.1.6.5
    pub const CTRL_OK: u8 = VIRTIO_NET_OK as u8;
    /// `VIRTIO_NET_ERR`
    pub const CTRL_ERR: u8 = VIRTIO_NET_ERR as u8;
    /// `VIRTIO_NET_CTRL_MQ`. §5.1.6.5.5
    pub const CTRL_MQ: u8 = VIRTIO_NET_CTRL_MQ as u8;
    /// `VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET`
    pub const CTRL_MQ_VQ_PAIRS_SET: u8 = VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET as u8;
    /// `VIRTIO_NET_CTRL_GUEST_OFFLOADS`. §5.1.6.5.8
    pub const CTRL_GUEST_OFFLOADS: u8 = VIRTIO_NET_CTRL_GUEST_OFFLOADS as u8;
    /// `VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET`
    pub const CTRL_GUEST_OFFLOADS_SET: u8 = VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET as u8;
}

/// Console. Virtio 1.3 §5.3.
pub mod console {
    /// Bytes of `struct virtio_console_config`. §5.3.4
    pub const CONFIG_SIZE: usize = 12;
    /// Queue from which the guest receives. §5.3.2
    pub const RECEIVEQ: u16 = 0;
    /// Queue to which it transmits.
    pub const TRANSMITQ: u16 = 1;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_numbers_are_the_specification_s() {
        // Virtio 1.3 §5
        use device_type::{BLOCK, CONSOLE, ENTROPY, NET};
        assert_eq!([NET, BLOCK, CONSOLE, ENTROPY], [1, 2, 3, 4]);
        // §2.1
        use status::{ACKNOWLEDGE, DEVICE_NEEDS_RESET, DRIVER, DRIVER_OK, FAILED, FEATURES_OK};
        assert_eq!([ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK], [1, 2, 4, 8]);
        assert_eq!([DEVICE_NEEDS_RESET, FAILED], [64, 128]);
        // §6, §2.7.6
        use feature::{EVENT_IDX, INDIRECT_DESC, VERSION_1};
        assert_eq!(
            [INDIRECT_DESC, EVENT_IDX, VERSION_1],
            [28, 29, 32].map(|bit| 1 << bit)
        );
        assert_eq!(AVAIL_F_NO_INTERRUPT, 1);
        assert_eq!([DESC_F_NEXT, DESC_F_WRITE, DESC_F_INDIRECT], [1, 2, 4]);
    }

    /// Virtio 1.3 §5.2.3, §5.2.6
    #[test]
    fn the_numbers_of_a_block_device_are_the_specification_s() {
        use blk::*;
        let features = F_SEG_MAX | F_RO | F_BLK_SIZE | F_FLUSH | F_TOPOLOGY | F_MQ;
        assert_eq!(
            features,
            1 << 2 | 1 << 5 | 1 << 6 | 1 << 9 | 1 << 10 | 1 << 12
        );
        assert_eq!(
            [F_FLUSH, F_CONFIG_WCE, F_DISCARD, F_WRITE_ZEROES],
            [1 << 9, 1 << 11, 1 << 13, 1 << 14]
        );
        assert_eq!((CONFIG_CAPACITY, CONFIG_WRITEBACK), (0, 32));
        let requests = [T_IN, T_OUT, T_FLUSH, T_GET_ID, T_DISCARD, T_WRITE_ZEROES];
        assert_eq!(requests, [0, 1, 4, 8, 11, 13]);
        assert_eq!([S_OK, S_IOERR, S_UNSUPP], [0, 1, 2]);
        assert_eq!((ID_SIZE, RANGE_F_UNMAP), (20, 1));
    }

    /// Virtio 1.3 §5.1.3 to §5.1.6
    #[test]
    fn the_numbers_of_a_network_card_are_the_specification_s() {
        use net::*;
        let ours = [
            F_CSUM,
            F_GUEST_CSUM,
            F_CTRL_GUEST_OFFLOADS,
            F_MAC,
            F_MRG_RXBUF,
        ];
        assert_eq!(ours, [0, 1, 2, 5, 15].map(|bit| 1 << bit));
        let theirs = [F_GUEST_TSO4, F_GUEST_TSO6, F_GUEST_ECN];
        assert_eq!(theirs, [7, 8, 9].map(|bit| 1 << bit));
        let hosts = [F_HOST_TSO4, F_HOST_TSO6, F_HOST_ECN];
        assert_eq!(hosts, [11, 12, 13].map(|bit| 1 << bit));
        assert_eq!(
            [F_STATUS, F_CTRL_VQ, F_MQ],
            [16, 17, 22].map(|bit| 1 << bit)
        );
        assert_eq!((S_LINK_UP, HEADER_SIZE, HEADER_NUM_BUFFERS), (1, 12, 10));
        assert_eq!((CTRL_OK, CTRL_ERR), (0, 1));
        assert_eq!((CTRL_MQ, CTRL_MQ_VQ_PAIRS_SET), (4, 0));
        assert_eq!((CTRL_GUEST_OFFLOADS, CTRL_GUEST_OFFLOADS_SET), (5, 0));
    }
}

/// Persistent memory. Virtio 1.3 §5.19.
pub mod pmem {
    /// `VIRTIO_PMEM_REQ_TYPE_FLUSH`. §5.19.6
    pub const REQ_FLUSH: u32 = 0;
    /// What was written before is on the host's storage. §5.19.7
    pub const RESP_OK: u32 = 0;
    /// It is not.
    pub const RESP_EIO: u32 = 1;
}

/// Memory balloon. Virtio 1.3 §5.5.
pub mod balloon {
    /// Bytes of the pages that numbers count, whatever pages the guest has. §5.5.6
    pub const PAGE: u64 = 1 << 12;
    /// Queue of pages that go into the balloon. §5.5.2
    pub const INFLATEQ: u16 = 0;
    /// Queue of pages that leave it.
    pub const DEFLATEQ: u16 = 1;
    /// The first of the queues that there are with their features alone.
    pub const STATSQ: u16 = 2;
    /// `VIRTIO_BALLOON_F_MUST_TELL_HOST`: the driver uses no page of the balloon before the device has answered that it may.
    /// §5.5.3
    pub const F_MUST_TELL_HOST: u64 = 1 << 0;
    /// `VIRTIO_BALLOON_F_STATS_VQ`: the driver gives statistics. §5.5.3
    pub const F_STATS_VQ: u64 = 1 << 1;
    /// `VIRTIO_BALLOON_F_DEFLATE_ON_OOM`: the driver takes pages out where it has no memory.
    pub const F_DEFLATE_ON_OOM: u64 = 1 << 2;
    /// `VIRTIO_BALLOON_F_PAGE_REPORTING`: the driver reports free pages.
    pub const F_REPORTING: u64 = 1 << 5;
    /// Bytes of the configuration as far as these features have it: `num_pages` and `actual`. §5.5.4
    pub const CONFIG_SIZE: usize = 8;
    /// Where the pages stand that the balloon is to have.
    pub const CONFIG_NUM_PAGES: usize = 0;
    /// Where the driver writes how many it has.
    pub const CONFIG_ACTUAL: usize = 4;
}

/// Memory device. Virtio 1.3 §5.15; the numbers are those of linux/virtio_mem.h.
pub mod mem {
    /// `VIRTIO_MEM_F_ACPI_PXM`: the configuration says of which proximity domain the memory is. §5.15.3
    pub const F_ACPI_PXM: u64 = 1 << 0;
    /// `VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE`: the driver does not touch memory that is not plugged. §5.15.3
    pub const F_UNPLUGGED_INACCESSIBLE: u64 = 1 << 1;
    /// The one queue, of requests. §5.15.2
    pub const GUEST_REQUESTQ: u16 = 0;
    /// Bytes of `struct virtio_mem_config`. §5.15.4
    pub const CONFIG_SIZE: usize = 56;
    /// Where the block's size stands in it.
    pub const CONFIG_BLOCK_SIZE: usize = 0;
    /// Where the number of the memory's proximity domain stands (`node_id`), two bytes.
    pub const CONFIG_NODE_ID: usize = 8;
    /// Where the region's first guest-physical address stands.
    pub const CONFIG_ADDR: usize = 16;
    /// Where the region's size stands.
    pub const CONFIG_REGION_SIZE: usize = 24;
    /// Where it stands how much of the region the driver may use now.
    pub const CONFIG_USABLE_REGION_SIZE: usize = 32;
    /// Where it stands how much is plugged.
    pub const CONFIG_PLUGGED_SIZE: usize = 40;
    /// Where it stands how much the driver is to have plugged.
    pub const CONFIG_REQUESTED_SIZE: usize = 48;
    /// Bytes of a request. §5.15.6
    pub const REQUEST_SIZE: usize = 24;
    /// Bytes of a response.
    pub const RESPONSE_SIZE: usize = 10;
    /// `VIRTIO_MEM_REQ_PLUG`
    pub const REQ_PLUG: u16 = 0;
    /// `VIRTIO_MEM_REQ_UNPLUG`
    pub const REQ_UNPLUG: u16 = 1;
    /// `VIRTIO_MEM_REQ_UNPLUG_ALL`
    pub const REQ_UNPLUG_ALL: u16 = 2;
    /// `VIRTIO_MEM_REQ_STATE`
    pub const REQ_STATE: u16 = 3;
    /// `VIRTIO_MEM_RESP_ACK`: it is done.
    pub const RESP_ACK: u16 = 0;
    /// `VIRTIO_MEM_RESP_NACK`: it is more than the driver is to have.
    pub const RESP_NACK: u16 = 1;
    /// `VIRTIO_MEM_RESP_BUSY`: not now; the driver tries again.
    pub const RESP_BUSY: u16 = 2;
    /// `VIRTIO_MEM_RESP_ERROR`: no such request can be.
    pub const RESP_ERROR: u16 = 3;
    /// `VIRTIO_MEM_STATE_PLUGGED`
    pub const STATE_PLUGGED: u16 = 0;
    /// `VIRTIO_MEM_STATE_UNPLUGGED`
    pub const STATE_UNPLUGGED: u16 = 1;
    /// `VIRTIO_MEM_STATE_MIXED`
    pub const STATE_MIXED: u16 = 2;
}

/// Socket device. Virtio 1.3 §5.10.
pub mod vsock {
    /// `VIRTIO_VSOCK_F_SEQPACKET`: there are sockets of type SOCK_SEQPACKET. §5.10.3
    pub const F_SEQPACKET: u64 = 1 << 1;
    /// `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET`: all connections are gone, and the address may be another.
    /// §5.10.6.7
    pub const EVENT_TRANSPORT_RESET: u32 = 0;
    /// `VIRTIO_VSOCK_TYPE_STREAM`. §5.10.6
    pub const TYPE_STREAM: u16 = 1;
    /// `VIRTIO_VSOCK_OP_REQUEST`. §5.10.6
    pub const OP_REQUEST: u16 = 1;
    /// `VIRTIO_VSOCK_OP_RESPONSE`
    pub const OP_RESPONSE: u16 = 2;
    /// `VIRTIO_VSOCK_OP_RST`
    pub const OP_RST: u16 = 3;
    /// `VIRTIO_VSOCK_OP_SHUTDOWN`
    pub const OP_SHUTDOWN: u16 = 4;
    /// `VIRTIO_VSOCK_OP_RW`
    pub const OP_RW: u16 = 5;
    /// `VIRTIO_VSOCK_OP_CREDIT_UPDATE`
    pub const OP_CREDIT_UPDATE: u16 = 6;
    /// `VIRTIO_VSOCK_OP_CREDIT_REQUEST`
    pub const OP_CREDIT_REQUEST: u16 = 7;
    /// `VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE`: its sender receives no more. §5.10.6.6
    pub const SHUTDOWN_RECEIVE: u32 = 1;
    /// `VIRTIO_VSOCK_SHUTDOWN_F_SEND`: its sender sends no more. §5.10.6.6
    pub const SHUTDOWN_SEND: u32 = 2;
    /// `VMADDR_CID_HOST`: the host's address. linux/vm_sockets.h
    pub const HOST_CID: u64 = 2;
}
