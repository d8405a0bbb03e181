//! Loads that fio puts on a disk, and what fio reports of them in JSON.
//!
//! fio's report comes from a guest, by its console: a report that is cut off, is no JSON or has no such figure is an error
//! that names the load and what is missing.

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

/// The part of a disk that loads read and write, in MiB: the same on every disk.
pub(crate) const AREA_MIB: u32 = 128;

/// How requests lie on the disk, and how large they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pattern {
    /// 4 KiB each, anywhere.
    Random,
    /// 512 KiB each, one after the other.
    Sequential,
}

/// One load of fio's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Load {
    pub(crate) pattern: Pattern,
    pub(crate) writes: bool,
    /// Requests under way for each queue.
    pub(crate) depth: u32,
    /// Queues of the disk's, each with a job of fio's.
    pub(crate) queues: u32,
}

impl Load {
    /// `randread-4k-d16-q1`: what it is called in the JSON, and among a guest's marks and values.
    pub(crate) fn name(&self) -> String {
        let size = match self.pattern {
            Pattern::Random => "4k",
            Pattern::Sequential => "512k",
        };
        format!("{}-{size}-d{}-q{}", self.kind(), self.depth, self.queues)
    }

    /// The same for people.
    pub(crate) fn title(&self) -> String {
        let what = match (self.pattern, self.writes) {
            (Pattern::Random, false) => "random reads of 4 KiB",
            (Pattern::Random, true) => "random writes of 4 KiB",
            (Pattern::Sequential, false) => "sequential reads of 512 KiB",
            (Pattern::Sequential, true) => "sequential writes of 512 KiB",
        };
        match self.queues {
            1 => format!("{what}, {} under way", self.depth),
            queues => format!(
                "{what}, {} under way on each of {queues} queues",
                self.depth
            ),
        }
    }

    /// fio's word for it (`--rw=`).
    fn kind(&self) -> &'static str {
        match (self.pattern, self.writes) {
            (Pattern::Random, false) => "randread",
            (Pattern::Random, true) => "randwrite",
            (Pattern::Sequential, false) => "read",
            (Pattern::Sequential, true) => "write",
        }
    }

    /// The command, whose report goes to a file. Each job has a part of the area for itself.
    pub(crate) fn command(&self, disk: &str, seconds: u32, report: &str) -> String {
        let bytes = match self.pattern {
            Pattern::Random => "4k",
            Pattern::Sequential => "512k",
        };
        let part = AREA_MIB / self.queues.max(1);
        format!(
            "fio --name=load --filename={disk} --rw={} --bs={bytes} --iodepth={} --numjobs={} --size={part}M \
             --offset_increment={part}M --ioengine=libaio --direct=1 --time_based --runtime={seconds} --group_reporting \
             --percentile_list=99 --disk_util=0 --output-format=json --output={report}",
            self.kind(),
            self.depth,
            self.queues
        )
    }
}

/// What a load came to.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Done {
    pub(crate) requests: f64,
    pub(crate) per_second: f64,
    /// Microseconds within which 99 of 100 requests were answered. Nothing where fio does not say.
    pub(crate) p99_us: Option<f64>,
}

/// Reads fio's report of a load.
///
/// # Errors
/// It is no report, or one of something else, or of a failure, or of no request at all.
pub(crate) fn parse(text: &str, load: &Load) -> Result<Done> {
    read(text, load).with_context(|| format!("fio's report of {}", load.name()))
}

fn read(text: &str, load: &Load) -> Result<Done> {
    // fio writes notes before it begins.
    let start = text.find('{').context("there is no JSON in it")?;
    let json = text.get(start..).unwrap_or_default();
    // What follows the report is not looked at.
    let mut reports = serde_json::Deserializer::from_str(json).into_iter::<Value>();
    let report = reports.next().context("there is no JSON in it")?;
    let report = report.context("it is cut off, or no JSON")?;
    let jobs = report.get("jobs").and_then(Value::as_array);
    let [job] = jobs.context("it has no jobs")?.as_slice() else {
        bail!("it is not of one group of jobs");
    };
    let error = job.get("error").context("it has no jobs[0].error")?;
    ensure!(error.as_u64() == Some(0), "fio's error {error}");
    let direction = if load.writes { "write" } else { "read" };
    let of = job
        .get(direction)
        .with_context(|| format!("it has no jobs[0].{direction}"))?;
    let number = |name: &str| {
        let value = of.get(name);
        let value = value.with_context(|| format!("it has no jobs[0].{direction}.{name}"))?;
        let number = value.as_f64().filter(|number| *number > 0.0);
        number.with_context(|| {
            format!("jobs[0].{direction}.{name} is {value}, and no number above 0")
        })
    };
    let p99 = of
        .get("clat_ns")
        .and_then(|latency| latency.get("percentile")?.get("99.000000")?.as_f64());
    Ok(Done {
        requests: number("total_ios")?,
        per_second: number("iops")?,
        p99_us: p99.map(|nanoseconds| nanoseconds / 1e3),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOAD: Load = Load {
        pattern: Pattern::Random,
        writes: false,
        depth: 16,
        queues: 1,
    };

    /// As fio 3.39 writes it, without what is not read, and with blanks taken out on the way.
    const REPORT: &str = r#"fio: note
{"fioversion":"fio-3.39","jobs":[{"jobname":"load","groupid":0,"error":0,
"read":{"io_bytes":40960000,"bw":13653,"iops":3333.25,"runtime":3000,"total_ios":10000,
"clat_ns":{"mean":4500000.5,"percentile":{"99.000000":9371648}}},
"write":{"io_bytes":0,"iops":0.0,"total_ios":0}}]}
"#;

    #[test]
    fn a_report_gives_requests_rate_and_latency() {
        let expected = Done {
            requests: 10000.0,
            per_second: 3333.25,
            p99_us: Some(9371.648),
        };
        assert_eq!(parse(REPORT, &LOAD).unwrap(), expected);
        let without = REPORT.replace("99.000000", "95.000000");
        assert_eq!(parse(&without, &LOAD).unwrap().p99_us, None);
    }

    #[test]
    fn a_report_that_is_cut_off_anywhere_is_an_error_that_names_the_load() {
        for end in 0..REPORT.trim_end().len() {
            let error = format!("{:#}", parse(&REPORT[..end], &LOAD).unwrap_err());
            assert!(
                error.starts_with("fio's report of randread-4k-d16-q1: "),
                "{end}: {error}"
            );
        }
    }

    #[test]
    fn what_a_report_lacks_or_has_wrong_is_named() {
        let said = |from: &str, to: &str| {
            let changed = REPORT.replacen(from, to, 1);
            assert_ne!(changed, REPORT);
            format!("{:#}", parse(&changed, &LOAD).unwrap_err())
        };
        for (from, to, what) in [
            ("\"jobs\"", "\"job\"", "it has no jobs"),
            ("\"error\":0", "\"error\":5", "fio's error 5"),
            ("\"error\":0", "\"error\":\"no\"", "fio's error \"no\""),
            ("\"read\"", "\"trim\"", "it has no jobs[0].read"),
            ("\"iops\"", "\"iop\"", "it has no jobs[0].read.iops"),
            ("3333.25", "-1", "jobs[0].read.iops is -1"),
            ("3333.25", "null", "jobs[0].read.iops is null"),
            ("10000", "0", "jobs[0].read.total_ios is 0"),
            ("10000", "\"10000\"", "jobs[0].read.total_ios is \"10000\""),
            ("[{\"jobname\"", "[{},{\"jobname\"", "one group of jobs"),
            ("3333.25", "1e999", "it is cut off, or no JSON"),
        ] {
            let error = said(from, to);
            assert!(error.contains(what), "{from} {to}: {error}");
        }
        let write = Load {
            writes: true,
            ..LOAD
        };
        let error = format!("{:#}", parse(REPORT, &write).unwrap_err());
        assert!(error.contains("jobs[0].write.total_ios is 0"), "{error}");
    }

    #[test]
    fn jobs_share_the_area_and_each_load_has_its_own_name() {
        let load = Load {
            pattern: Pattern::Sequential,
            writes: true,
            depth: 64,
            queues: 4,
        };
        assert_eq!(load.name(), "write-512k-d64-q4");
        let command = load.command("/dev/vda", 3, "/tmp/fio");
        for word in [
            "--rw=write",
            "--bs=512k",
            "--numjobs=4",
            "--size=32M",
            "--offset_increment=32M",
        ] {
            assert!(command.split(' ').any(|each| each == word), "{command}");
        }
    }
}
