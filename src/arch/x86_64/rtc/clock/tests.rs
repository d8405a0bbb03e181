use proptest::prelude::*;

use super::*;

/// 2023-11-14 22:13:20, a Tuesday.
const NOW: i64 = 1_700_000_000 * SECOND;

fn read(clock: &mut RtcState, index: u8, now: i64) -> u8 {
    clock.index = index;
    clock.read(now)
}

fn write(clock: &mut RtcState, index: u8, value: u8, now: i64) {
    clock.index = index;
    clock.write(value, now);
}

#[test]
fn the_time_is_the_hosts_in_bcd_or_binary_with_12_or_24_hours() {
    let mut clock = RtcState::new(NOW);
    let all = |clock: &mut RtcState| {
        [CENTURY, YEAR, MONTH, DAY, WEEKDAY, HOURS, MINUTES, SECONDS]
            .map(|index| read(clock, index, NOW))
    };
    assert_eq!(
        all(&mut clock),
        [0x20, 0x23, 0x11, 0x14, 3, 0x22, 0x13, 0x20]
    );
    clock.set_byte(B, B_BINARY | B_24_HOURS);
    assert_eq!(all(&mut clock), [20, 23, 11, 14, 3, 22, 13, 20]);
    clock.set_byte(B, 0);
    assert_eq!(all(&mut clock)[5], 0x10 | AFTERNOON);
}

#[test]
fn hours_survive_encoding_in_each_mode() {
    let mut clock = RtcState::new(NOW);
    for mode in [0, B_BINARY, B_24_HOURS, B_24_HOURS | B_BINARY] {
        clock.set_byte(B, mode);
        for hour in 0..24 {
            assert_eq!(clock.decode_hour(clock.encode_hour(hour)), hour);
        }
    }
}

#[test]
fn setting_the_time_is_an_offset_that_later_readings_keep() {
    let mut clock = RtcState::new(NOW);
    write(&mut clock, B, B_24_HOURS | B_SET, NOW);
    for (index, value) in [
        (CENTURY, 0x20),
        (YEAR, 0x30),
        (MONTH, 0x02),
        (DAY, 0x28),
        (HOURS, 0x23),
        (MINUTES, 0x59),
        (SECONDS, 0x59),
    ] {
        write(&mut clock, index, value, NOW + 5 * SECOND);
        assert_eq!(read(&mut clock, index, NOW + 9 * SECOND), value);
    }
    let set_at = NOW + 20 * SECOND;
    write(&mut clock, B, B_24_HOURS, set_at);
    assert_eq!(read(&mut clock, SECONDS, set_at + SECOND / 4), 0x59);
    // Half a second after it runs again comes the update.
    let later = set_at + SECOND / 2;
    assert_eq!(read(&mut clock, MONTH, later), 0x03);
    assert_eq!(read(&mut clock, DAY, later), 0x01);
    assert_eq!(read(&mut clock, SECONDS, later), 0x00);
}

#[test]
fn a_guest_sets_no_time_beyond_2199_or_before_1900() {
    for (bytes, year) in [([0xff, 0xff], 2199), ([0x22, 0x62], 2199), ([0, 0], 1900)] {
        for set in [0, B_SET] {
            let mut clock = RtcState::new(NOW);
            write(&mut clock, B, B_24_HOURS | set, NOW);
            for _ in 0..1000 {
                write(&mut clock, CENTURY, bytes[0], NOW);
                write(&mut clock, YEAR, bytes[1], NOW);
                for index in [MONTH, DAY, HOURS, MINUTES, SECONDS] {
                    write(&mut clock, index, bytes[1], NOW);
                }
            }
            // Where bytes carried it on from the end, it is back in the first year.
            write(&mut clock, CENTURY, bytes[0], NOW);
            write(&mut clock, B, B_24_HOURS | UPDATE, NOW);
            assert_eq!(clock.date(NOW).year, year, "{bytes:x?} {set:#x}");
            assert!(clock.next_interrupt(NOW).is_some_and(|due| due <= SECOND));
        }
    }
}

#[test]
fn at_the_end_of_time_nothing_is_due() {
    let mut clock = RtcState::new(NOW);
    clock.offset = i64::MAX;
    for index in [SECONDS_ALARM, MINUTES_ALARM, HOURS_ALARM] {
        write(&mut clock, index, 0xff, NOW);
    }
    write(&mut clock, B, B_24_HOURS | UPDATE | ALARM | PERIODIC, NOW);
    for now in [NOW, NOW + SECOND, i64::MAX - 1, i64::MAX] {
        clock.advance(now);
        assert_eq!(clock.next_interrupt(now), None);
    }
}

#[test]
fn update_in_progress_shows_just_before_the_second_ends() {
    let mut clock = RtcState::new(NOW);
    assert_eq!(read(&mut clock, A, NOW) & A_UIP, 0);
    assert_eq!(read(&mut clock, A, NOW + SECOND - 1) & A_UIP, A_UIP);
    write(&mut clock, B, B_SET, NOW);
    assert_eq!(read(&mut clock, A, NOW + SECOND - 1) & A_UIP, 0);
}

#[test]
fn an_alarm_asserts_the_interrupt_at_its_time_and_reading_c_takes_it_back() {
    let mut clock = RtcState::new(NOW);
    write(&mut clock, SECONDS_ALARM, 0x25, NOW);
    write(&mut clock, MINUTES_ALARM, 0x13, NOW);
    write(&mut clock, HOURS_ALARM, 0x22, NOW);
    assert_eq!(clock.next_interrupt(NOW), None, "not enabled");
    write(&mut clock, B, B_24_HOURS | ALARM, NOW);
    assert_eq!(clock.next_interrupt(NOW), Some(5 * SECOND));
    assert!(!clock.advance(NOW + 5 * SECOND - 1));
    assert!(clock.advance(NOW + 5 * SECOND));
    assert_eq!(clock.next_interrupt(NOW + 5 * SECOND), None, "asserted");
    let flags = read(&mut clock, C, NOW + 5 * SECOND);
    assert_eq!(flags & (C_IRQ | ALARM), C_IRQ | ALARM);
    assert!(!clock.asserted());
    assert_eq!(
        clock.next_interrupt(NOW + 5 * SECOND),
        Some(86_400 * SECOND),
        "the same time tomorrow"
    );
    write(&mut clock, MINUTES_ALARM, 0xff, NOW + 6 * SECOND);
    assert_eq!(
        clock.next_interrupt(NOW + 6 * SECOND),
        Some(59 * SECOND),
        "any minute"
    );
    write(&mut clock, HOURS_ALARM, 0x99, NOW + 6 * SECOND);
    assert_eq!(clock.next_interrupt(NOW + 6 * SECOND), None, "no such hour");
}

#[test]
fn an_alarm_at_a_time_that_there_is_not_is_not_searched_for() {
    let mut clock = RtcState::new(NOW);
    for index in [SECONDS_ALARM, MINUTES_ALARM, HOURS_ALARM] {
        write(&mut clock, index, 0xff, NOW);
    }
    write(&mut clock, SECONDS_ALARM, 0x99, NOW);
    write(&mut clock, B, B_24_HOURS | ALARM, NOW);
    let start = std::time::Instant::now();
    for step in 0..100_000 {
        assert!(!clock.advance(NOW + step * SECOND));
        assert_eq!(clock.next_interrupt(NOW + step * SECOND), None);
    }
    let took = start.elapsed();
    assert!(took.as_secs() < 30, "{took:?}");
}

#[test]
fn periodic_and_update_interrupts_come_at_their_boundaries() {
    let mut clock = RtcState::new(NOW);
    write(&mut clock, B, B_24_HOURS | PERIODIC | UPDATE, NOW);
    let tick = SECOND / 1024 + 1;
    assert_eq!(clock.next_interrupt(NOW), Some(tick));
    assert!(!clock.advance(NOW + tick - 1));
    assert!(clock.advance(NOW + tick));
    assert_eq!(read(&mut clock, C, NOW + tick), C_IRQ | PERIODIC);
    assert!(clock.advance(NOW + SECOND));
    assert_eq!(
        read(&mut clock, C, NOW + SECOND) & !ALARM,
        C_IRQ | PERIODIC | UPDATE
    );
    clock.reset(NOW + SECOND);
    assert_eq!(clock.next_interrupt(NOW + SECOND), None);
}

#[test]
fn a_host_clock_that_is_set_back_raises_nothing() {
    let mut clock = RtcState::new(NOW);
    write(&mut clock, B, B_24_HOURS | UPDATE, NOW);
    assert!(!clock.advance(NOW - 3600 * SECOND));
    assert_eq!(clock.next_interrupt(NOW - 3600 * SECOND), Some(SECOND));
}

proptest! {
    #[test]
    fn no_sequence_of_accesses_panics_and_ram_keeps_what_is_written(
        accesses in proptest::collection::vec(
            (0_u8..128, any::<u8>(), prop_oneof![0_i64..1 << 40, 0_i64..1 << 61]), 0..60,
        )
    ) {
        let mut clock = RtcState::new(NOW);
        let mut now = NOW;
        for (index, value, step) in accesses {
            now = i64::saturating_add(now, step);
            write(&mut clock, index, value, now);
            let back = read(&mut clock, index, now);
            if index > D && index != CENTURY {
                prop_assert_eq!(back, value);
            }
            clock.next_interrupt(now);
        }
    }

    #[test]
    fn a_clock_that_was_saved_goes_on_as_the_one_that_was_not(
        accesses in proptest::collection::vec((0_u8..128, any::<u8>(), 0_i64..1 << 36), 0..60),
        saved_after in 0_usize..60,
    ) {
        let mut clock = RtcState::new(NOW);
        let mut restored = clock.clone();
        let mut now = NOW;
        for (at, (index, value, step)) in accesses.into_iter().enumerate() {
            if at <= saved_after {
                let json = serde_json::to_string(&clock).unwrap();
                let saved: RtcState = serde_json::from_str(&json).unwrap();
                restored = saved.checked().unwrap();
                prop_assert_eq!(&restored, &clock);
            }
            now += step;
            for clock in [&mut clock, &mut restored] {
                write(clock, index, value, now);
            }
            let read_back = [&mut clock, &mut restored].map(|clock| read(clock, C, now));
            prop_assert_eq!(read_back[0], read_back[1]);
            prop_assert_eq!(clock.next_interrupt(now), restored.next_interrupt(now));
        }
    }

    #[test]
    fn a_state_from_anybody_is_refused_or_harmless(
        (index, flags, bytes) in (any::<u8>(), any::<u8>(), any::<[[u8; 32]; 4]>()),
        (offset, seen, stopped) in (any::<i64>(), any::<i64>(), any::<Option<i64>>()),
        registers in proptest::collection::vec((0_u8..128, any::<u8>()), 0..20),
    ) {
        let mut cmos = [0; BYTES];
        cmos.copy_from_slice(bytes.as_flattened());
        let state = RtcState {
            version: VERSION, index, bytes: cmos, flags, offset, stopped, seen,
        };
        if let Ok(mut clock) = state.checked() {
            for (index, value) in registers {
                write(&mut clock, index, value, NOW);
                read(&mut clock, index, NOW);
                clock.next_interrupt(NOW);
            }
        }
    }
}

#[test]
fn what_no_clock_can_have_been_is_refused() {
    let newer = RtcState {
        version: 2,
        ..RtcState::new(NOW)
    };
    assert_eq!(newer.checked(), Err(RtcStateError::Version(2)));
    let torn = RtcState {
        stopped: Some(0),
        ..RtcState::new(NOW)
    };
    assert_eq!(torn.checked(), Err(RtcStateError::Stopped));
    let mut short = serde_json::to_value(RtcState::new(NOW)).unwrap();
    short["bytes"] = vec![0_u8; 127].into();
    let error = serde_json::from_value::<RtcState>(short).unwrap_err();
    assert!(error.to_string().contains("128 bytes of CMOS"), "{error}");
}
