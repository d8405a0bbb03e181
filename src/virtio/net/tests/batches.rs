//! Bursts: what is done together, how often the driver hears of it, and what a broken chain behind them costs.

use super::super::worker::{Budget, ROUND, ROUND_BYTES};
use super::*;

/// Frames of a burst, as many as a ring of the tests holds.
const BURST: u64 = 64;
/// Most interrupts of a burst. One is enough where the worker finds all of it; while it was busy with what came before, a
/// burst is seen in parts.
const INTERRUPTS: u64 = 4;

/// Where the frames of a burst lie.
fn buffer(driver: &mut Driver, packet: &[u8]) -> (u64, u32, bool) {
    let at = driver.alloc(0x1000);
    driver.write(at, &[0; net::HEADER_SIZE]);
    driver.write(at + net::HEADER_SIZE as u64, packet);
    (at, (net::HEADER_SIZE + packet.len()) as u32, false)
}

#[test]
fn a_burst_of_the_guests_is_returned_together_and_interrupts_once() {
    for features in [0, spec::feature::EVENT_IDX] {
        let Some(net) = card(2) else { return };
        let wire = Wire::new(net.tap_name());
        let mut driver = Driver::new(net);
        let (_rx, mut tx) = bring_up(&mut driver, features);
        let packet = |seed| frame(HOST, GUEST, 500, seed as u8);
        let chains: Vec<_> = (0..BURST)
            .map(|seed| vec![buffer(&mut driver, &packet(seed))])
            .collect();
        // The worker may look before it is notified.
        tx.submit_together(&chains);
        driver.notify(&tx);
        for seed in 0..BURST {
            assert_eq!(wire.receive(), packet(seed), "in their order");
            assert_eq!(u64::from(tx.wait_used().0), seed);
        }
        let interrupts = driver.route(1).wait();
        assert!(interrupts <= INTERRUPTS, "{interrupts} for {BURST} frames");
    }
}

#[test]
fn a_burst_for_the_guest_is_handed_over_together_and_interrupts_once() {
    for features in [0, spec::feature::EVENT_IDX] {
        let Some(net) = card(2) else { return };
        let wire = Wire::new(net.tap_name());
        let mut driver = Driver::new(net);
        let (mut rx, _tx) = bring_up(&mut driver, features | net::F_MRG_RXBUF);
        // Without buffers, so that all of them wait.
        let packet = |seed| frame(GUEST, HOST, 500, seed as u8);
        // The host's own stack may have sent some of its own, which have their buffers, too.
        for seed in 0..BURST / 2 {
            wire.send(&packet(seed));
        }
        let buffers = provide(&mut driver, &mut rx, BURST, 2048);
        for seed in 0..BURST / 2 {
            let expected = (1, packet(seed));
            assert_eq!(receive_and_keep(&driver, &mut rx, &buffers), expected);
        }
        let interrupts = driver.route(0).wait();
        assert!(interrupts <= INTERRUPTS, "{interrupts} for {BURST} frames");
    }
}

/// The next packet of ours, in a buffer that does not go back.
fn receive_and_keep(driver: &Driver, ring: &mut Ring, buffers: &[u64]) -> (u16, Vec<u8>) {
    loop {
        let (head, len) = ring.wait_used();
        let packet = driver.read(buffers[head as usize % buffers.len()], len as usize);
        if packet.get(24..26) == Some(&ETHERTYPE.to_be_bytes()) {
            let count = u16::from_le_bytes([packet[10], packet[11]]);
            return (count, packet[net::HEADER_SIZE..].to_vec());
        }
    }
}

#[test]
fn what_was_sent_before_a_broken_chain_is_returned_and_the_card_needs_a_reset() {
    let Some(net) = card(2) else { return };
    let wire = Wire::new(net.tap_name());
    let mut driver = Driver::new(net);
    let (_rx, mut tx) = bring_up(&mut driver, 0);
    let packet = |seed| frame(HOST, GUEST, 100, seed);
    for seed in 0..3 {
        let chain = buffer(&mut driver, &packet(seed));
        tx.submit(&[chain]);
    }
    // A descriptor that goes on at itself. Virtio 1.3 §2.7.5.1
    tx.describe(3, 0x1000, 64, spec::DESC_F_NEXT, 3);
    tx.make_available(3);
    driver.notify(&tx);
    for seed in 0..3 {
        assert_eq!(wire.receive(), packet(seed));
        assert_eq!(tx.wait_used().0, u32::from(seed));
    }
    eventually("needs reset", || {
        driver.status() & status::DEVICE_NEEDS_RESET != 0
    });
    assert_eq!(tx.poll_used(), None, "the broken chain is not returned");
    driver.set_common(common::DEVICE_STATUS, &[0]);
    let (_rx, mut tx) = bring_up(&mut driver, 0);
    let chain = buffer(&mut driver, &packet(9));
    driver.run(&mut tx, &[chain]);
    assert_eq!(wire.receive(), packet(9));
}

#[test]
fn a_round_ends_after_so_many_frames_or_bytes() {
    let mut budget = Budget::new();
    for _ in 0..ROUND {
        assert!(!budget.is_spent());
        budget.spend(60);
    }
    assert!(budget.is_spent());
    let mut budget = Budget::new();
    let long = 1 << 16;
    for _ in 0..ROUND_BYTES / long {
        assert!(!budget.is_spent());
        budget.spend(long);
    }
    assert!(budget.is_spent());
}
