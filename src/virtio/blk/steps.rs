//! A long request in steps, between which the worker looks whether the device is being stopped: the
//! vCPU that resets it, or whoever pauses it, waits for the worker.
//!
//! A step is 8 MiB read or written ([`MAX_TRANSFER`](crate::virtio::segments::MAX_TRANSFER)), 16 MiB
//! zeroed (the longest range that the guest may name), or [`FREED`] discarded. A flush is one system
//! call, which nothing divides. A request that is left off is not answered. After a pause it is done
//! from its beginning; after a reset nobody asks for it, and what of it has been done stays, as after a
//! power cut.

use std::io;

/// Bytes of one step of a discard, unless the storage frees only larger pieces: a few ten thousand
/// extents of a file that is as scattered as can be.
pub(super) const FREED: u64 = 128 << 20;

/// Says whether the device is being stopped.
pub(super) type Stop<'a> = &'a dyn Fn() -> bool;

/// # Errors
/// [`io::ErrorKind::Interrupted`]: the device is being stopped.
pub(super) fn go_on(stop: Stop<'_>) -> io::Result<()> {
    if stop() {
        return Err(io::ErrorKind::Interrupted.into());
    }
    Ok(())
}

/// Cuts `start..start + len` at the multiples of `step`, so that no piece of the storage that could be
/// freed is cut in two, and has `call` do each part, given its start and length.
///
/// # Errors
/// Those of [`go_on`], and of `call`.
pub(super) fn each(
    start: u64,
    len: u64,
    step: u64,
    stop: Stop<'_>,
    mut call: impl FnMut(u64, u64) -> io::Result<()>,
) -> io::Result<()> {
    let end = start.saturating_add(len);
    let mut at = start;
    while at < end {
        go_on(stop)?;
        let next = at.saturating_add(1).checked_next_multiple_of(step);
        let next = next.unwrap_or(end).min(end);
        call(at, next.saturating_sub(at))?;
        at = next;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parts(start: u64, len: u64, step: u64, stop: Stop<'_>) -> (Vec<(u64, u64)>, bool) {
        let mut parts = Vec::new();
        let result = each(start, len, step, stop, |start, len| {
            parts.push((start, len));
            Ok(())
        });
        (parts, result.is_ok())
    }

    #[test]
    fn a_range_is_cut_at_the_multiples_of_the_step() {
        let never = || false;
        assert_eq!(
            parts(6, 10, 4, &never),
            (vec![(6, 2), (8, 4), (12, 4)], true)
        );
        assert_eq!(parts(4, 4, 4, &never), (vec![(4, 4)], true));
        assert_eq!(parts(4, 0, 4, &never), (vec![], true));
        let last = (u64::MAX - 1, 1);
        assert_eq!(parts(last.0, 9, 4, &never), (vec![last], true));
    }

    #[test]
    fn no_part_follows_the_stop() {
        let looks = std::cell::Cell::new(0);
        let third = || looks.replace(looks.get() + 1) == 2;
        assert_eq!(parts(0, 40, 4, &third), (vec![(0, 4), (4, 4)], false));
    }
}
