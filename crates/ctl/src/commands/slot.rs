//! `kmsctl slot`: root slots, to be seen only.

use fleet_kms_admin_api::{Operation, Slot};

use crate::cli::SlotVerb;
use crate::commands::Session;
use crate::failure::Failure;
use crate::output::Table;
use crate::output::table::{column, wide};
use crate::output::time::relative;

pub(super) async fn run(session: &mut Session<'_>, verb: SlotVerb) -> Result<(), Failure> {
    match verb {
        SlotVerb::List => {
            let slots: Vec<Slot> = session.client().await?.list(Operation::ListSlots, &[]).await?;
            session.show(&slots, |all, now| {
                let columns =
                    [column("SLOT"), column("KIND"), column("VERIFIED"), wide("ADDED"), column("ROOT KEY")];
                let mut table = Table::new(all, &columns);
                let ago =
                    |time: Option<_>| time.map_or_else(|| "never".to_owned(), |time| relative(time, now));
                for slot in &slots {
                    let in_use = if slot.in_use { " (in use)" } else { "" };
                    table.row([
                        slot.id.clone(),
                        slot.kind.to_string(),
                        ago(slot.verified),
                        ago(slot.added),
                        format!("{}{in_use}", slot.label),
                    ]);
                }
                table.finish("no root slots")
            })
        }
    }
}
