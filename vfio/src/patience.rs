//! Calls that the kernel refuses while somebody on the host holds the device, instead of waiting: it says
//! EAGAIN then. A device is held while an attribute of it is set that concerns its driver or its power,
//! as udev's rules do, and while it is being unbound.

use std::io;
use std::thread;
use std::time::Duration;

/// How long is waited, each time.
const PAUSES: [Duration; 3] = [
    Duration::from_millis(5),
    Duration::from_millis(20),
    Duration::from_millis(75),
];

/// Calls until the device is not held, but not for long.
///
/// # Errors
/// The call's.
pub(crate) fn patiently<T>(mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    for pause in PAUSES {
        match call() {
            Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => thread::sleep(pause),
            result => return result,
        }
    }
    call()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How often a call that answers so is made, and what comes of it.
    fn calls(answer: impl Fn(u32) -> Option<i32>) -> (u32, io::Result<u32>) {
        let mut made = 0;
        let result = patiently(|| {
            made += 1;
            answer(made).map_or(Ok(made), |error| Err(io::Error::from_raw_os_error(error)))
        });
        (made, result)
    }

    #[test]
    fn a_device_that_is_held_is_asked_again_and_not_for_ever() {
        let held_twice = |made| (made < 3).then_some(libc::EAGAIN);
        assert!(matches!(calls(held_twice), (3, Ok(3))));
        let (made, result) = calls(|_| Some(libc::EAGAIN));
        assert_eq!(
            (made, result.unwrap_err().raw_os_error()),
            (4, Some(libc::EAGAIN))
        );
        let (made, result) = calls(|_| Some(libc::ENODEV));
        assert_eq!(
            (made, result.unwrap_err().raw_os_error()),
            (1, Some(libc::ENODEV))
        );
    }
}
