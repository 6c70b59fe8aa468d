//! `page`: results as Markdown and plots, made from what the suites printed.
//!
//! Reads the last line of what `kvasir-bench quality --json` printed, and of
//! `kvasir-bench kvstats --json` where it is given; writes `quality.md`. Of runs of blending, makes
//! `blending.md`. Plots are `quality/*.svg`. The same JSON gives the same bytes, so a page that differs
//! from its JSON was edited by hand.
//!
//! Tables and plots follow the rows: what has no rows is left out, and what is
//! not known by name is shown under its name.

use std::io;
use std::path::{Path, PathBuf};

mod blend;
mod figure;
mod legend;
mod markdown;
mod plot;
mod read;
mod scatter;
mod text;

#[cfg(test)]
mod tests;

use blend::Blending;
use plot::Plot;
use read::Report;
pub(crate) use scatter::Scatter;

/// What to make a page of, and where.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Options {
    /// What `kvasir-bench quality --json` printed, for `quality.md`.
    #[arg(long, value_name = "FILE", required_unless_present = "blend")]
    quality: Option<PathBuf>,
    /// What `kvasir-bench kvstats --json` printed.
    #[arg(long, value_name = "FILE", requires = "quality")]
    kvstats: Option<PathBuf>,
    /// What `kvasir-bench quality --json --methods naive,blend:RULE:BUDGET,…` printed, for
    /// `blending.md`; may be given several times.
    #[arg(long, value_name = "FILE")]
    blend: Vec<PathBuf>,
    /// Directory to write the pages and `quality/*.svg` to.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
}

/// Why there is no page.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PageError {
    /// The file is not there, or not text.
    #[error("cannot read {}: pass the file that a report was written to", path.display())]
    Read {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// The file has no line.
    #[error("{} is empty: write the output of `kvasir-bench {suite} --json` to it", path.display())]
    Empty { path: PathBuf, suite: &'static str },
    /// The last line is something else.
    #[error(
        "the last line of {} is not a report: it must be the JSON that \
         `kvasir-bench {suite} --json` prints last, so look whether the run ended well",
        path.display()
    )]
    Json {
        path: PathBuf,
        suite: &'static str,
        #[source]
        source: serde_json::Error,
    },
    /// Another suite's report.
    #[error(
        "{} is a report of `{found}`, not of `{suite}`: \
         pass the output of `kvasir-bench {suite} --json`",
        path.display()
    )]
    Suite {
        path: PathBuf,
        suite: &'static str,
        found: String,
    },
    /// Nothing to make a page of.
    #[error(
        "{} has no rows {missing}: run `kvasir-bench {suite} --json` again with this version",
        path.display()
    )]
    Rows {
        path: PathBuf,
        suite: &'static str,
        missing: &'static str,
    },
    /// A plot could not be laid out.
    #[error("cannot draw {plot}")]
    Draw {
        plot: String,
        #[source]
        source: figure::DrawError,
    },
    /// A file could not be written.
    #[error("cannot write {}: --out must be a directory that can be written", path.display())]
    Write {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// Writes the pages and says which files they are.
pub(crate) fn run(options: &Options) -> Result<(), PageError> {
    let kvstats = options
        .kvstats
        .as_deref()
        .map(|path| Report::load(path, KVSTATS))
        .transpose()?;
    let mut files = Vec::new();
    if let Some(path) = &options.quality {
        let quality = Report::load(path, QUALITY)?;
        check(&quality, path, kvstats.as_ref(), options.kvstats.as_deref())?;
        files = page(&quality, kvstats.as_ref())?;
    }
    let blends: Vec<Report> = options
        .blend
        .iter()
        .map(|path| blend::load(path))
        .collect::<Result<_, _>>()?;
    if !blends.is_empty() {
        files.extend(blending(&blends)?);
    }
    for (name, content) in files {
        let path = options.out.join(name);
        let written = path
            .parent()
            .map_or(Ok(()), std::fs::create_dir_all)
            .and_then(|()| std::fs::write(&path, content));
        written.map_err(|source| PageError::Write {
            path: path.clone(),
            source,
        })?;
        eprintln!("wrote {}", path.display());
    }
    Ok(())
}

/// Whether there is anything to show.
fn check(
    quality: &Report,
    quality_path: &Path,
    kvstats: Option<&Report>,
    kvstats_path: Option<&Path>,
) -> Result<(), PageError> {
    if read::Quality::new(quality).tasks_of("em").is_empty() {
        return Err(PageError::Rows {
            path: quality_path.to_owned(),
            suite: QUALITY,
            missing: "`METHOD/TASK/em`",
        });
    }
    match (kvstats, kvstats_path) {
        (Some(report), Some(path)) if report.rows.is_empty() => Err(PageError::Rows {
            path: path.to_owned(),
            suite: KVSTATS,
            missing: "at all",
        }),
        _ => Ok(()),
    }
}

/// Every file of the page on quality, by its path below the directory.
fn page(quality: &Report, kvstats: Option<&Report>) -> Result<Vec<(String, String)>, PageError> {
    let plots = plot::all(quality, kvstats)?;
    let text = markdown::page(quality, kvstats, &plots);
    Ok(files("quality.md", text, plots))
}

/// Every file of the page on blending.
fn blending(blends: &[Report]) -> Result<Vec<(String, String)>, PageError> {
    let plots = blend::plot::all(&Blending::new(blends))?;
    let text = markdown::blending(blends, &plots);
    Ok(files("blending.md", text, plots))
}

fn files(page: &str, text: String, plots: Vec<Plot>) -> Vec<(String, String)> {
    let plots = plots.into_iter().map(|plot| (plot.path(), plot.svg));
    std::iter::once((page.to_owned(), text))
        .chain(plots)
        .collect()
}

const QUALITY: &str = "quality";
const KVSTATS: &str = "kvstats";
