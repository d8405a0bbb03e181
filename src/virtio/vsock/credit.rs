//! How much either end of a connection may send: neither sends what the other has no room for. Virtio 1.3 §5.10.6.3.

use super::packet::Header;

/// Bytes that are kept of what the guest has sent on a connection, while the program on the host does not read.
pub(super) const ROOM: u32 = 128 << 10;
/// The guest is told of room that has become free, without its asking, when it is this much.
const TELL: u32 = ROOM / 4;

/// The credit of one connection, both ways. All counts run freely modulo 2^32.
#[derive(Clone, Debug, Default)]
pub(super) struct Credit {
    /// The guest's buffer, and what it has taken out of it.
    guest_room: u32,
    guest_forwarded: u32,
    /// What it was sent.
    sent: u32,
    /// What it has sent, what the host's program has had of that, and how much of that the guest knows.
    received: u32,
    forwarded: u32,
    told: u32,
}

impl Credit {
    /// Notes what a packet of the guest's says of its buffer.
    pub(super) fn learn(&mut self, header: &Header) {
        self.guest_room = header.buf_alloc.get();
        self.guest_forwarded = header.fwd_cnt.get();
    }

    /// Bytes that the guest has room for. None, where what it says cannot be.
    pub(super) fn for_guest(&self) -> u32 {
        let there = self.sent.wrapping_sub(self.guest_forwarded);
        self.guest_room.saturating_sub(there)
    }

    /// The guest was sent so many bytes, no more than it has room for.
    pub(super) fn send(&mut self, count: usize) {
        self.sent = self.sent.wrapping_add(wrapped(count));
    }

    /// The guest has sent so many bytes. Whether there is room for them.
    pub(super) fn receive(&mut self, count: usize) -> bool {
        let kept = self.received.wrapping_sub(self.forwarded);
        let fits = u32::try_from(count).is_ok_and(|count| count <= ROOM.saturating_sub(kept));
        if fits {
            self.received = self.received.wrapping_add(wrapped(count));
        }
        fits
    }

    /// The host's program has had so many bytes of those, or they are of no use any more.
    pub(super) fn forward(&mut self, count: usize) {
        self.forwarded = self.forwarded.wrapping_add(wrapped(count));
    }

    /// The guest's program may wait for room that it does not know of.
    pub(super) fn is_due(&self) -> bool {
        self.forwarded.wrapping_sub(self.told) >= TELL
    }

    /// The buffer and what was taken out of it, for a header that goes to the guest.
    pub(super) fn tell(&mut self) -> (u32, u32) {
        self.told = self.forwarded;
        (ROOM, self.forwarded)
    }
}

/// The last 32 bits, for counts that run modulo 2^32.
fn wrapped(count: usize) -> u32 {
    (count & u32::MAX as usize) as u32
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A step of the two programs that speak with each other.
    #[derive(Clone, Debug)]
    enum Step {
        /// The guest's sends as much as it may of this.
        GuestSends(u32),
        /// The host's reads.
        HostReads(u32),
        /// The host's sends as much as it may of this.
        HostSends(u32),
        /// The guest's reads.
        GuestReads(u32),
        /// The guest says how it is.
        GuestTells,
    }

    fn step() -> impl Strategy<Value = Step> {
        let size = prop_oneof![0_u32..8, 0_u32..5000, 0..2 * ROOM];
        (0_u8..5, size).prop_map(|(kind, size)| match kind {
            0 => Step::GuestSends(size),
            1 => Step::HostReads(size),
            2 => Step::HostSends(size),
            3 => Step::GuestReads(size),
            _ => Step::GuestTells,
        })
    }

    proptest! {
        /// A guest that keeps to what it was told is never refused, neither buffer ever has more than it holds, wherever
        /// the counts begin; and a guest that waits for room hears of it when the host's program has read all.
        #[test]
        fn no_order_of_reads_and_writes_overruns_a_buffer_or_leaves_a_sender_waiting(
            start in any::<[u32; 2]>(),
            guest_room in 1_u32..300_000,
            steps in proptest::collection::vec(step(), 0..200),
        ) {
            let [begun, sent] = start;
            let mut credit = Credit {
                guest_room,
                guest_forwarded: sent,
                sent,
                received: begun,
                forwarded: begun,
                told: begun,
            };
            // As the guest counts.
            let (mut out, mut known) = (begun, begun);
            let (mut kept, mut held, mut guest_read) = (0_u32, 0_u32, sent);
            for step in steps {
                match step {
                    Step::GuestSends(size) => {
                        let size = size.min(ROOM - out.wrapping_sub(known));
                        prop_assert!(credit.receive(size as usize));
                        out = out.wrapping_add(size);
                        kept += size;
                        prop_assert!(kept <= ROOM);
                    }
                    Step::HostReads(size) => {
                        let size = size.min(kept);
                        credit.forward(size as usize);
                        kept -= size;
                    }
                    Step::HostSends(size) => {
                        let size = size.min(credit.for_guest());
                        credit.send(size as usize);
                        held += size;
                        prop_assert!(held <= guest_room);
                    }
                    Step::GuestReads(size) => {
                        let size = size.min(held);
                        held -= size;
                        guest_read = guest_read.wrapping_add(size);
                    }
                    Step::GuestTells => credit.learn(&Header {
                        buf_alloc: guest_room.into(),
                        fwd_cnt: guest_read.into(),
                        ..Header::default()
                    }),
                }
                if credit.is_due() {
                    known = credit.tell().1;
                }
            }
            credit.forward(kept as usize);
            let waits = out.wrapping_sub(known) == ROOM;
            prop_assert!(!waits || credit.is_due());
            credit.learn(&Header {
                buf_alloc: guest_room.into(),
                fwd_cnt: guest_read.wrapping_add(held).into(),
                ..Header::default()
            });
            prop_assert_eq!(credit.for_guest(), guest_room);
        }

        #[test]
        fn what_a_guest_says_of_its_buffer_gives_no_more_than_that_buffer(
            room: u32, forwarded: u32, sent: u32,
        ) {
            let mut credit = Credit { sent, ..Credit::default() };
            credit.learn(&Header {
                buf_alloc: room.into(),
                fwd_cnt: forwarded.into(),
                ..Header::default()
            });
            prop_assert!(credit.for_guest() <= room);
        }
    }

    #[test]
    fn more_than_there_is_room_for_is_refused() {
        let mut credit = Credit::default();
        assert!(!credit.receive(ROOM as usize + 1));
        assert!(credit.receive(ROOM as usize));
        assert!(!credit.receive(1));
        credit.forward(1);
        assert!(credit.receive(1) && !credit.receive(1));
    }
}
