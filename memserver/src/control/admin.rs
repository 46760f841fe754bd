//! The admin socket: one JSON object per line in, one per line out.
//!
//! ```text
//! {"cmd":"status"}                       {"ok":true,"status":{…}}
//! {"cmd":"images"}                       {"ok":true,"images":[…]}
//! {"cmd":"sessions"}                     {"ok":true,"sessions":[…]}
//! {"cmd":"add","path":"/x/parent.snowidx"}   {"ok":true,"image":"00112233…"}
//! {"cmd":"drop","image":"00112233…"}     {"ok":true}
//! {"cmd":"workingset","image":"00112233…"}   {"ok":true,"working_set":{…}}
//! {"cmd":"export","image":"00112233…"}   {"ok":true,"data":"…"}                the file NAME.snowws in hexadecimal digits
//! {"cmd":"import","image":"00112233…","data":"…"}  {"ok":true,"working_set":{…}}   it takes the place of what is known
//! {"cmd":"drain","grace_ms":1000}        {"ok":true}
//!                                        {"ok":false,"error":"…"}
//! ```

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use descriptor::ImageId;
use serde::{Deserialize, Serialize};
use tokio_uring::net::UnixStream;

use super::status::{self, ImageStatus, SessionStatus, Status, WorkingSetStatus};
use super::{PATIENCE, Settings, client};
use crate::image::{ImageError, ServedImage};
use crate::server::add_image;
use crate::shared::Shared;

/// The longest command: a working set that is imported, of some 100 KiB.
const MAX_LINE: usize = 2 << 20;

/// A command.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "cmd", rename_all = "lowercase", deny_unknown_fields)]
pub enum Command {
    /// Tell everything.
    Status,
    /// List the images.
    Images,
    /// List the sessions.
    Sessions,
    /// Put an image into service.
    Add {
        /// Its index file, as the server sees it.
        path: PathBuf,
    },
    /// Take an image out of service.
    Drop {
        /// Its name.
        image: ImageId,
    },
    /// Tell what the clones of an image needed, in numbers.
    WorkingSet {
        /// The image.
        image: ImageId,
    },
    /// Tell all that is known of what the clones of an image needed.
    Export {
        /// The image.
        image: ImageId,
    },
    /// Put another working set into the place of what is known.
    Import {
        /// The image.
        image: ImageId,
        /// The file's bytes, in hexadecimal digits.
        data: String,
    },
    /// Stop.
    Drain {
        /// How long sessions may go on.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        grace_ms: Option<u64>,
    },
}

/// An answer.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Reply {
    /// The command was carried out.
    pub ok: bool,
    /// Why it was not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// To `status`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub status: Option<Status>,
    /// To `images`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub images: Option<Vec<ImageStatus>>,
    /// To `sessions`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sessions: Option<Vec<SessionStatus>>,
    /// To `add`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image: Option<ImageId>,
    /// To `workingset` and `import`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub working_set: Option<WorkingSetStatus>,
    /// To `export`, in hexadecimal digits.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data: Option<String>,
}

/// Answers the commands of one connection until it ends, or is silent for too long.
pub(super) async fn serve(stream: UnixStream, shared: Arc<Shared>, settings: Settings) -> io::Result<()> {
    let mut lines = Lines::default();
    loop {
        let Ok((result, chunk)) = tokio::time::timeout(PATIENCE, stream.read(Vec::with_capacity(4096))).await else {
            return Ok(());
        };
        if result? == 0 {
            return Ok(());
        }
        lines.bytes.extend_from_slice(&chunk);
        while let Some(line) = lines.next() {
            let reply = answer(&line, &shared, settings).await;
            let mut bytes = serde_json::to_vec(&reply)?;
            bytes.push(b'\n');
            let Ok((result, _)) = tokio::time::timeout(PATIENCE, stream.write_all(bytes)).await else {
                return Ok(());
            };
            result?;
        }
        if lines.bytes.len() > MAX_LINE {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a command without end"));
        }
    }
}

/// Bytes that become lines.
#[derive(Default)]
struct Lines {
    bytes: Vec<u8>,
    /// Of them, those that were searched for a line's end: a long line comes in many pieces.
    searched: usize,
}

impl Lines {
    /// Takes the first line out, with its end.
    fn next(&mut self) -> Option<Vec<u8>> {
        let fresh = self.bytes.get(self.searched..).unwrap_or_default();
        let Some(end) = fresh.iter().position(|byte| *byte == b'\n') else {
            self.searched = self.bytes.len();
            return None;
        };
        let rest = self.bytes.split_off(self.searched + end + 1);
        self.searched = 0;
        Some(std::mem::replace(&mut self.bytes, rest))
    }
}

async fn answer(line: &[u8], shared: &Arc<Shared>, settings: Settings) -> Reply {
    let command = match serde_json::from_slice(line) {
        Ok(command) => command,
        Err(error) => return Reply::failed(&format!("no command: {error}")),
    };
    let done = Reply { ok: true, ..Reply::default() };
    match command {
        Command::Status => Reply { status: Some(Status::of(shared)), ..done },
        Command::Images => Reply { images: Some(status::images(shared)), ..done },
        Command::Sessions => Reply { sessions: Some(Status::of(shared).sessions), ..done },
        Command::Add { path } => {
            let shared = Arc::clone(shared);
            let added = tokio::task::spawn_blocking(move || add_image(&shared, &path, settings.preload)).await;
            match added {
                Ok(Ok(image)) => Reply { image: Some(image), ..done },
                Ok(Err(error)) => Reply::failed(&descriptor::Report(&error).to_string()),
                Err(error) => Reply::failed(&error.to_string()),
            }
        }
        Command::Drop { image } => {
            let shared = Arc::clone(shared);
            // It writes the working set.
            match tokio::task::spawn_blocking(move || shared.drop_image(image)).await {
                Ok(Ok(())) => done,
                Ok(Err(error)) => Reply::failed(&error.to_string()),
                Err(error) => Reply::failed(&error.to_string()),
            }
        }
        Command::WorkingSet { image } => match with_working_set(shared, image) {
            Ok(image) => Reply { working_set: Some(WorkingSetStatus::of(&image)), ..done },
            Err(error) => Reply::failed(&error),
        },
        Command::Export { image } => match with_working_set(shared, image) {
            Ok(image) => Reply { data: Some(client::to_hex(&image.needed().export())), ..done },
            Err(error) => Reply::failed(&error),
        },
        Command::Import { image, data } => {
            let imported = with_working_set(shared, image).and_then(|image| import(shared, &image, &data));
            imported.map_or_else(|error| Reply::failed(&error), |set| Reply { working_set: Some(set), ..done })
        }
        Command::Drain { grace_ms } => {
            shared.drain(grace_ms.map_or(settings.grace, Duration::from_millis));
            done
        }
    }
}

fn with_working_set(shared: &Shared, image: ImageId) -> Result<Arc<ServedImage>, String> {
    if shared.keeper.is_none() {
        return Err("the server keeps no working sets (--working-sets off)".to_owned());
    }
    shared.catalog.find(image).ok_or_else(|| ImageError::Unknown(image).to_string())
}

fn import(shared: &Shared, image: &ServedImage, data: &str) -> Result<WorkingSetStatus, String> {
    let bytes = client::from_hex(data).ok_or("the data are no hexadecimal digits")?;
    image.needed().import(&bytes).map_err(|error| descriptor::Report(&error).to_string())?;
    let status = WorkingSetStatus::of(image);
    if let Some(keeper) = &shared.keeper {
        keeper.replaced(Arc::clone(image.needed()));
    }
    Ok(status)
}

impl Reply {
    fn failed(error: &str) -> Self {
        Self { error: Some(error.to_owned()), ..Self::default() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_come_in_pieces_of_any_size() {
        let text = b"one\n\nthree and more\nrest";
        for size in 1..=text.len() {
            let mut lines = Lines::default();
            let mut found = Vec::new();
            for chunk in text.chunks(size) {
                lines.bytes.extend_from_slice(chunk);
                while let Some(line) = lines.next() {
                    found.push(String::from_utf8(line).unwrap());
                }
                assert_eq!(lines.searched, lines.bytes.len(), "nothing is searched twice");
            }
            assert_eq!(found, ["one\n", "\n", "three and more\n"]);
            assert_eq!(lines.bytes, b"rest");
        }
    }
}
