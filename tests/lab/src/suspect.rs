//! Failures that may be the emulator's own, and not what is on trial: see `docs/lab.md`.

use std::cell::Cell;
use std::error::Error;
use std::fmt;

/// A failure of a kind that the emulator is known for.
#[derive(Debug)]
pub(crate) struct Suspect(pub(crate) String);

impl fmt::Display for Suspect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Error for Suspect {}

/// Whether something did not come within its limit, the emulated host died, a guest did, or an interrupt came twice.
pub fn may_be_the_emulators(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| cause.is::<Suspect>())
}

thread_local! {
    /// A guest of this thread's trial that was left had triple-faulted, and begun anew.
    static LEFT: Cell<bool> = const { Cell::new(false) };
}

/// A guest is left that has triple-faulted, though it was not to: whatever its trial failed of, that may be why.
pub(crate) fn left_a_triple_fault() {
    LEFT.set(true);
}

/// A trial's outcome, as one that may be the emulator's where a guest that it left had triple-faulted.
///
/// # Errors
/// The trial's.
pub fn with_guests_left(outcome: anyhow::Result<()>) -> anyhow::Result<()> {
    let left = LEFT.replace(false);
    match outcome {
        Err(error) if left && !may_be_the_emulators(&error) => {
            Err(Suspect(format!("the guest triple-faulted, and then: {error:#}")).into())
        }
        outcome => outcome,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_fails_beside_a_guest_that_triple_faulted_may_be_the_emulators() {
        let failure = || Err(anyhow::anyhow!("the drive is gone"));
        let plain = with_guests_left(failure()).unwrap_err();
        assert!(!may_be_the_emulators(&plain));
        left_a_triple_fault();
        let left = with_guests_left(failure()).unwrap_err();
        assert!(may_be_the_emulators(&left));
        assert!(left.to_string().contains("the drive is gone"), "{left}");
        // The next trial's guests are others.
        let next = with_guests_left(failure()).unwrap_err();
        assert!(!may_be_the_emulators(&next));
    }
}
