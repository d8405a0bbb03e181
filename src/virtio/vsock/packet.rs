//! A vsock packet's header, and what becomes of a connection's two ends. Virtio 1.3 §5.10.6.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::virtio::spec::vsock;

/// `struct virtio_vsock_hdr`. Virtio 1.3 §5.10.6
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub(super) struct Header {
    pub(super) src_cid: U64,
    pub(super) dst_cid: U64,
    pub(super) src_port: U32,
    pub(super) dst_port: U32,
    /// Bytes of data behind it.
    pub(super) len: U32,
    /// What kind of socket it is of.
    pub(super) kind: U16,
    pub(super) op: U16,
    pub(super) flags: U32,
    /// Bytes that its sender buffers for the connection.
    pub(super) buf_alloc: U32,
    /// Bytes of the connection that its sender has taken out of that buffer, modulo 2^32.
    pub(super) fwd_cnt: U32,
}

/// Its bytes.
pub(super) const HEADER_SIZE: usize = size_of::<Header>();

impl Header {
    /// The connection that it is of, as a packet of the guest's.
    pub(super) fn key(&self) -> Key {
        Key {
            host: self.dst_port.get(),
            guest: self.src_port.get(),
        }
    }
}

/// What tells a connection of a guest's from its others: there are two addresses and one kind of socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Key {
    /// The port at the host's end.
    pub(super) host: u32,
    /// The port at the guest's.
    pub(super) guest: u32,
}

/// What a packet is for. Virtio 1.3 §5.10.6
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Op {
    /// A connection is asked for.
    Request,
    /// It is granted.
    Response,
    /// It is refused, or over.
    Rst,
    /// Its sender will send no more, or receive no more, or both.
    Shutdown,
    /// Data.
    Rw,
    /// How much its sender can take.
    CreditUpdate,
    /// The same is asked for.
    CreditRequest,
}

impl Op {
    const ALL: [(Self, u16); 7] = [
        (Self::Request, vsock::OP_REQUEST),
        (Self::Response, vsock::OP_RESPONSE),
        (Self::Rst, vsock::OP_RST),
        (Self::Shutdown, vsock::OP_SHUTDOWN),
        (Self::Rw, vsock::OP_RW),
        (Self::CreditUpdate, vsock::OP_CREDIT_UPDATE),
        (Self::CreditRequest, vsock::OP_CREDIT_REQUEST),
    ];

    /// What a packet says that it is; nothing where there is no such thing.
    pub(super) fn of(header: &Header) -> Option<Self> {
        let found = Self::ALL
            .iter()
            .find(|(_, number)| *number == header.op.get());
        found.map(|(op, _)| *op)
    }

    pub(super) fn number(self) -> U16 {
        let found = Self::ALL.iter().find(|(op, _)| *op == self);
        U16::new(found.map_or(vsock::OP_RST, |(_, number)| *number))
    }
}

/// What is to be sent to the guest: a header's parts that differ from packet to packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Outgoing {
    pub(super) op: Op,
    pub(super) flags: u32,
    /// Bytes of data, which are in their place already.
    pub(super) len: usize,
}

impl Outgoing {
    /// One without data or flags.
    pub(super) fn bare(op: Op) -> Self {
        Self {
            op,
            flags: 0,
            len: 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_has_the_fields_of_the_specification_in_44_bytes() {
        assert_eq!(HEADER_SIZE, 44);
        let bytes: Vec<u8> = (0..44).collect();
        let header = Header::read_from_bytes(&bytes).unwrap();
        assert_eq!(header.dst_cid.get().to_le_bytes()[0], 8);
        assert_eq!(header.len.get().to_le_bytes()[0], 24);
        assert_eq!(header.op.get().to_le_bytes()[0], 30);
        assert_eq!(header.fwd_cnt.get().to_le_bytes(), [40, 41, 42, 43]);
    }

    #[test]
    fn each_number_of_an_operation_is_one_and_no_other_number_is() {
        for number in 0..=u16::MAX {
            let header = Header {
                op: number.into(),
                ..Header::default()
            };
            match Op::of(&header) {
                Some(op) => assert_eq!(op.number().get(), number),
                None => assert!(!(1..=7).contains(&number)),
            }
        }
    }
}
