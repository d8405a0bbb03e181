//! What iperf3 reports in JSON of a stream of bytes. It comes from a guest, as fio's reports do.

use anyhow::{Context, Result, bail};
use serde_json::Value;

/// What a stream came to, as its receiver saw it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Moved {
    /// Megabytes, of 10^6 bytes.
    pub(crate) megabytes: f64,
    pub(crate) per_second: f64,
}

/// Reads the client's report of the stream `name`.
///
/// # Errors
/// It is cut off, or of a failure, or has no such figures.
pub(crate) fn parse(text: &str, name: &str) -> Result<Moved> {
    read(text).with_context(|| format!("iperf3's report of {name}"))
}

fn read(text: &str) -> Result<Moved> {
    let report: Value = serde_json::from_str(text).context("it is cut off, or no JSON")?;
    if let Some(error) = report.get("error") {
        bail!("iperf3's error {error}");
    }
    let number = |name: &str| {
        let value = report.pointer(&format!("/end/sum_received/{name}"));
        let value = value.with_context(|| format!("it has no end.sum_received.{name}"))?;
        let number = value.as_f64().filter(|number| *number > 0.0);
        number.with_context(|| format!("end.sum_received.{name} is {value}, and no number above 0"))
    };
    Ok(Moved {
        megabytes: number("bytes")? / 1e6,
        per_second: number("bits_per_second")? / 8e6,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const REPORT: &str = r#"{"start":{},"intervals":[],"end":{"sum_sent":{"bytes":9000000},
        "sum_received":{"seconds":2.0,"bytes":8000000,"bits_per_second":32000000}}}"#;

    #[test]
    fn a_report_gives_what_the_receiver_had() {
        let moved = Moved {
            megabytes: 8.0,
            per_second: 4.0,
        };
        assert_eq!(parse(REPORT, "up").unwrap(), moved);
    }

    #[test]
    fn a_report_that_is_cut_off_or_of_a_failure_is_an_error_that_names_the_stream() {
        for end in 0..REPORT.len() {
            let error = format!("{:#}", parse(&REPORT[..end], "up").unwrap_err());
            assert!(error.starts_with("iperf3's report of up: "), "{error}");
        }
        let refused = r#"{"start":{},"error":"unable to connect to server"}"#;
        for (text, what) in [
            (refused, "iperf3's error \"unable to connect to server\""),
            ("{}", "it has no end.sum_received.bytes"),
            (
                &REPORT.replace("8000000,", "-1,"),
                "end.sum_received.bytes is -1",
            ),
            (
                &REPORT.replace("32000000", "0"),
                "end.sum_received.bits_per_second is 0",
            ),
        ] {
            let error = format!("{:#}", parse(text, "up").unwrap_err());
            assert!(error.contains(what), "{error}");
        }
    }
}
