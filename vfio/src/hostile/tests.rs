//! Random stories, and some that were told before.

use proptest::collection::vec;
use proptest::prelude::*;

use super::{bars, configuration, msix};

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn configuration_space_holds_whatever_device_and_guest_do(story in vec(any::<u8>(), 0..600)) {
        configuration(&story);
    }

    #[test]
    fn what_is_mapped_is_what_decodes_wherever_the_guest_moves_bars(story in vec(any::<u8>(), 0..800)) {
        bars(&story);
    }

    #[test]
    fn the_msix_table_reads_as_written_and_connects_nothing_while_off(story in vec(any::<u8>(), 0..400)) {
        msix(&story);
    }
}

#[test]
fn of_a_table_with_pending_bits_over_it_the_guest_has_the_entries_before_them() {
    // 65 entries at 0, and pending bits at 0x100.
    msix(&[0x40, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0x0a, 0, 3, 0x70]);
}
