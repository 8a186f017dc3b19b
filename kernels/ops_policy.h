/* ops_policy - the ops that policies of the KV cache work with: scores and what follows from them, rows that leave,
 * clusters of keys, pages' bounds, evicted tokens in host memory. The second half of ops.h, which includes it; their
 * structs stand there, beside the table. */
#ifndef VITRAIL_KERNELS_OPS_POLICY_H
#define VITRAIL_KERNELS_OPS_POLICY_H

#include "kernels/ops.h"

/* ops_judge_columns - a decode step's rows as judges of generated tokens, after attention_decode_log_sum of the same q
 * and lanes, whose log_sum it takes: no key is read but those of tokens that the row judges. Adds to the sum of
 * every token of an unsettled block the row's attention to it, times the row's weight over the number of the block's
 * rows, each query head's product rounded half to even to an integer of 2^-40. The newest token's sum is set to 0
 * instead. Rows outside of a block's rows add nothing to it. Attention is the softmax over the whole lane. From
 * decode_begin on, the judges' progress and blocks stay as they are: a GPU reads them before attention has ended. Lanes
 * are in kv->format, as for attention_decode. */
int ops_judge_columns(struct ops *o, struct tensor q, const float *log_sum, const struct seq_batch *batch,
                      const struct kv_view *kv, const struct attention_heads *heads,
                      const struct decode_judges *judges) MUST_CHECK;
/* ops_cluster_bytes - device memory that ops_cluster_keys works in, for lanes of at most so many entries and clusters.
 */
size_t ops_cluster_bytes(const struct ops *o, int n_lanes, int head_dim, int max_entries, int max_clusters);
/* ops_cluster_keys - k-means by cosine of the keys of job's entries, lane by lane (ClusterKV): `iterations` times each
 * key goes to the centre of the largest cosine (0 with a zero vector; equal: the lower cluster) and each centre becomes
 * the mean of its keys as they are, summed in float32 in a fixed order (an empty cluster keeps its centre); then keys
 * are assigned once more. Writes centroids, sizes and entries of the job's clusters alone; state is the caller's. Of a
 * list's entries the places in the list are written, as ~place: they are to be moved to host memory afterwards. Keys of
 * a lane in an 8-bit format are what its codes and scales stand for. */
int ops_cluster_keys(struct ops *o, const struct kv_view *kv, const struct kv_clusters *clusters,
                     const struct cluster_job *job) MUST_CHECK;
/* ops_aside_begin, ops_aside_end - what is issued between them runs after all that was issued before, beside what is
 * issued behind them, and in order with what runs aside already. ops_aside_join - what follows comes after all that ran
 * aside; before it nobody writes what that reads, or touches what it writes. Only ops that use none of the backend's
 * scratch: ops_upload, ops_zero, ops_cluster_keys (which has clusters.work). Not within a captured step. Whoever began
 * ends, also when an op failed between. Without a second stream to run them in, ops run in the order they come in. */
int ops_aside_begin(struct ops *o) MUST_CHECK;
void ops_aside_end(struct ops *o);
int ops_aside_join(struct ops *o) MUST_CHECK;
/* ops_select_clusters - what a decode step attends to (struct kv_list): for each row and KV head (or, by query head,
 * for each row and query head) the entries before the clustered ones, `budget` of the clustered ones (all, if there are
 * fewer), and all behind them. Clusters come in falling order of their scores (enum cluster_kv_group; equal: the lower
 * cluster), entries within in theirs; the last cluster is cut. q [n, n_heads, head_dim], after kv_append. count -1 (the
 * whole lane) where the lane has no clusters, or where the budget takes them all and none is in host memory; 0 for a
 * padding row. The order of a list is fixed but means nothing; what lies behind its end too. stride: room of a list, no
 * less than a lane has clusters; what a lane's list takes more than that is a bug, and its whole lane is read. Device
 * work only. */
int ops_select_clusters(struct ops *o, int32_t *entry, int32_t *count, int stride, struct tensor q,
                        enum cluster_kv_group by, const struct seq_batch *batch, const struct kv_view *kv,
                        const struct attention_heads *heads, const struct kv_clusters *clusters) MUST_CHECK;
/* ops_list_others - of each of n_lanes lists the numbers below n that it does not hold, ascending: other[i *
 * other_stride + 0 .. n - n_keep[i]) (device) from keep[i * keep_stride + 0 .. n_keep[i]) (ascending, below n, device;
 * n_keep host). */
int ops_list_others(struct ops *o, int32_t *other, int other_stride, const int32_t *keep, int keep_stride,
                    const int32_t *n_keep, int n, int n_lanes) MUST_CHECK;
/* ops_kv_split - copies, of n_lanes lanes from `lane` on of a slot, the entries index[i * index_stride + 0 ..
 * n_index[i]) (device; n_index host) to the empty lane of the same number in `host`, a view of kv's geometry whose pool
 * lies in host memory, its tables on the device. The lanes stay as they are. A lane that is not empty in `host`:
 * KV_ERROR_LANE_FULL. */
int ops_kv_split(struct ops *o, const struct kv_view *kv, const struct kv_view *host, int slot, int lane, int n_lanes,
                 const int32_t *index, int index_stride, const int32_t *n_index) MUST_CHECK;
/* ops_recall - a decode step's lists before its attention: entries of host memory that are at a place of `recent`
 * become that place, in the list; those that are not are copied to places that the last steps did not list, in the
 * order of the list and of the places, and become these; what finds no place stays as it is. No two rows of the batch
 * have the same slot. Device work only. */
int ops_recall(struct ops *o, int32_t *entry, const int32_t *count, int stride, const struct seq_batch *batch,
               const struct kv_view *kv, const struct attention_heads *heads, const struct kv_view *host,
               const struct kv_recent *recent) MUST_CHECK;
/* ops_kv_drop - drops entries from the middle of lanes of a slot; what stands behind them moves left inside the lane's
 * own pages, pages beyond are pushed back, in whatever format the lanes are. index: device; drop: host [n_drops], no
 * lane in two of them. */
int ops_kv_drop(struct ops *o, const struct kv_view *kv, int slot, const int32_t *index, const struct kv_drop *drop,
                int n_drops) MUST_CHECK;
/* ops_split_budgets - for each group of rows of score [rows, n] float32: every row gets its best `own` of the group's
 * n_columns first columns, and all other entries of the group compete for the total - n_rows * own that are left;
 * count[row] (device [rows]) = how many entries of the row are in. Equal scores: the lower row, then the lower column
 * wins. group: host; n_rows * own <= total <= n_rows * n_columns. Rows in no group are left alone. */
int ops_split_budgets(struct ops *o, int32_t *count, struct tensor score, const struct budget_group *group,
                      int n_groups) MUST_CHECK;
/* ops_heavy_begin - the account of a slot's lanes once they were packed: of lane i the entry j < limit has the score
 * score[i, index[i * index_stride + j]] and that position. score [lanes_per_slot, prompt tokens] float32; limit was
 * written before. */
int ops_heavy_begin(struct ops *o, const struct kv_view *kv, const struct heavy_hitters *heavy, int slot,
                    struct tensor score, const int32_t *index, int index_stride) MUST_CHECK;
/* ops_heavy_decode - H2O's step after a layer's decode attention: the lane's newest entry, at position[row], joins with
 * score 0; every entry's score grows by the attention that the row pays it, summed over the group's heads; while the
 * lane holds more than its limit, the entry with the least score outside the newest `recent` goes (equal scores: the
 * later position), its place taken by the lane's last entry. q [n, n_heads, head_dim]; position [n] device. Lanes are
 * in kv->format, as for attention_decode. */
int ops_heavy_decode(struct ops *o, struct tensor q, const int32_t *position, const struct seq_batch *batch,
                     const struct kv_view *kv, const struct attention_heads *heads,
                     const struct heavy_hitters *heavy) MUST_CHECK;
/* ops_average_pool - y[r, j] = (x[r, j - width / 2] + ... + x[r, j + width / 2]) / width, columns outside x being 0.
 * y, x [rows, n] float32 that do not overlap, row strides free; width odd. */
int ops_average_pool(struct ops *o, struct tensor y, struct tensor x, int width) MUST_CHECK;
/* ops_page_bounds - least and largest of each channel over the keys of each page (struct page_pick) of n_lanes lanes of
 * a slot, from `lane` on. bounds [n_pages, kv_picked_pages * 2, head_dim], dense, in the activation dtype: exact, or of
 * lanes in an 8-bit format rounded. Of plain lanes that are about to be rewritten in kv.format they stand where the
 * pages will be. */
int ops_page_bounds(struct ops *o, struct tensor bounds, const struct kv_view *kv, int slot, int lane,
                    int n_lanes) MUST_CHECK;
/* ops_pick_pages - in a decode step, after kv_append: brings the bounds of each lane's last page up to date, ranks its
 * pages by the most that a key within the bounds could give to any query head of the group (sum over channels of
 * max(q * least, q * largest), unscaled), and lists the entries of the best limit[slot] pages, ascending. Equal scores:
 * the lower page wins. count -1 where that is the whole lane, and for a lane of more than max_pages such pages. Padding
 * rows: count 0. */
int ops_pick_pages(struct ops *o, struct tensor q, const struct seq_batch *batch, const struct kv_view *kv,
                   const struct attention_heads *heads, const struct page_pick *pick) MUST_CHECK;
/* ops_sum_fixed - sum[j] = the sum over the rows of x [rows, n] float32 of x[r, j] * scale, each rounded half to even
 * to a multiple of 2^-40 before it is added; sum [n] int64 in units of 2^-40, so the same whatever rows are added
 * where. Magnitudes up to 2^13 are exact, larger ones and NaN are cut (NaN: 0). No rows: zeros. */
int ops_sum_fixed(struct ops *o, int64_t *sum, struct tensor x, double scale) MUST_CHECK;
/* ops_select_rows - the rows that stay, choice after choice: index[...] = first_row + place, ascending in each. Those
 * with the highest score [...] int64 (device) win; equal scores: the lower place. choice: host [n_choices], 0 <= keep
 * <= n_competing. A choice writes n_rows - n_competing + keep numbers, right after those of the one before. */
int ops_select_rows(struct ops *o, int32_t *index, const int64_t *score, const struct row_choice *choice,
                    int n_choices) MUST_CHECK;
/* ops_expected_attention - scores keys by the attention that queries to come should pay them, drawn from a Gaussian:
 * mean mu and population covariance Sigma, for each head, of the rows before their rotation, turned by the mean
 * rotation over the `future` positions. With c = heads->scale, per head and key z = c k.mu + c^2 / 2 * k Sigma k, a =
 * softmax of z over the keys from `sinks` on; score = (mean of a over the group's heads + epsilon) * |v|, and +infinity
 * for keys before `sinks`. q [n_rows, n_heads, head_dim] post-RoPE; lanes as attention_probe finds them. */
int ops_expected_attention(struct ops *o, struct tensor q, const struct kv_view *kv,
                           const struct attention_heads *heads, const struct expected_attention *expected) MUST_CHECK;

#endif
