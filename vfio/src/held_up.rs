//! A step that the kernel takes long for, where a test of a whole run asks for one: a device that does not come
//! back from its reset keeps whoever waits for it a minute, and no device of a lab does that.

#[cfg(debug_assertions)]
use std::path::Path;
#[cfg(debug_assertions)]
use std::time::Duration;

/// The environment variable that tests set: a folder, in which a file `STEP-ADDRESS` holds that step of that device
/// up for as long as it is there.
#[cfg(debug_assertions)]
const FOLDER: &str = "BUSWAY_TEST_HOLD_UP";

/// What is held up.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Step {
    /// The opening of a device, before the kernel is asked.
    Opening,
    /// A reset that is asked of the kernel.
    Reset,
    /// The closing.
    Closing,
}

/// Returns when nothing holds the step up, which a release does not look for.
#[cfg(debug_assertions)]
pub(crate) fn where_a_test_asks(step: Step, device: impl std::fmt::Display) {
    let Some(folder) = std::env::var_os(FOLDER) else {
        return;
    };
    let step = match step {
        Step::Opening => "opening",
        Step::Reset => "reset",
        Step::Closing => "closing",
    };
    let file = Path::new(&folder).join(format!("{step}-{device}"));
    if file.exists() {
        log::warn!("{device}: its {step} is held up, as a test asks");
    }
    while file.exists() {
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[cfg(not(debug_assertions))]
pub(crate) fn where_a_test_asks(_step: Step, _device: impl std::fmt::Display) {}
